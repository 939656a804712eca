"""Which layers go: from the configuration to a collector, and from its sums to spans."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ghost_dist.calibration.split import fold_of_range
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.config import SelectionConfig
from ghost_dist.pipeline.collectors import MakeCollector, kept_numbers
from ghost_dist.pipeline.cost import AROUND, SMALL_BYTES, Cost, Fits
from ghost_dist.progress import Advance
from ghost_dist.solver.least_squares import RIDGE_GRID, step_flops
from ghost_dist.solver.span_selection import (
    HeldOut,
    choose_spans,
    cost_map,
    held_out_of_start,
    lost_log_energy,
    paper_span,
)
from ghost_dist.spans import Span
from ghost_dist.statistics.layer_scores import ScoreCollector, ScoreSums
from ghost_dist.statistics.pair_sums import FLUSH_TOKENS as PAIR_FLUSH_TOKENS
from ghost_dist.statistics.pair_sums import (
    PROJECTION_COLUMNS,
    PairCollector,
    PairMoments,
    candidate_spans,
    projection,
    start_key,
)
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.sum_costs import pair_bytes, pair_flops, saved_by_strips
from ghost_dist.statistics.sums import WHOLE, ColumnBlock

if TYPE_CHECKING:
    from ghost_dist.pipeline.run_shape import RunShape

_SHARE_FOR_SUMS = 0.7


@dataclass(frozen=True)
class Selector:
    """One selection: its criterion, and how many layers go."""

    config: SelectionConfig
    remove: int
    architecture: Architecture

    @property
    def columns(self) -> int | None:
        """Columns of the projection; None: one length only, where the whole cross is affordable."""
        return PROJECTION_COLUMNS if self._max_spans > 1 else None

    @property
    def _max_spans(self) -> int:
        return self.config.max_spans or 1

    def candidates(self) -> tuple[Span, ...]:
        """All spans that `recoverability` may choose from; ConfigError if there are none."""
        config = self.config
        shortest, longest = self.remove, self.remove
        if self._max_spans > 1:
            shortest = config.min_length
            longest = min(config.max_length or self.remove, self.remove)
        return candidate_spans(self.architecture.num_layers, shortest, longest, config.protect)

    def entries(self) -> dict[str, str]:
        """Names and kinds of the sums that the criterion needs."""
        if self.config.criterion != "recoverability":
            return {"scores": "scores"}
        return {start_key(start): "pairs" for start in self.stops_of()}

    def start_bytes(self) -> int:
        """Bytes of the sums of the start with the most stops."""
        most = max(self.stops_of().values())
        return pair_bytes(self.architecture.hidden_size, most, self.columns)

    def start_stored_bytes(self, blocks: int) -> int:
        """The same in the store, where the ranks keep so many blocks of columns."""
        return self.start_bytes() - saved_by_strips(self.architecture.hidden_size, blocks)

    def stops_of(self) -> dict[int, int]:
        """Number of stops of every start."""
        return dict(sorted(Counter(span.start for span in self.candidates()).items()))

    def starts_at_once(self, free_bytes: int, block: ColumnBlock = WHOLE) -> int:
        """Starts whose sums fit on a device with so much free memory: those of one pass."""
        of_start = self.start_bytes() // block.count
        return max(1, int(free_bytes * _SHARE_FOR_SUMS) // of_start)

    @property
    def last_boundary(self) -> int:
        """All layers: the last ones are candidates too."""
        return self.architecture.num_layers

    def passes(
        self, device: torch.device, free_bytes: int, block: ColumnBlock
    ) -> list[MakeCollector]:
        """A factory per pass over the windows; see ``pipeline.collectors.Collectors``."""
        if self.config.criterion != "recoverability":
            return [lambda: ScoreCollector(self.architecture.num_layers, self.remove, device)]
        starts = list(self.stops_of())
        at_once = self.starts_at_once(free_bytes, block)
        groups = [starts[i : i + at_once] for i in range(0, len(starts), at_once)]
        return [
            lambda group=frozenset(group): PairCollector(  # type: ignore[misc]
                [span for span in self.candidates() if span.start in group],
                self.architecture.hidden_size,
                device,
                self.columns,
                block,
            )
            for group in groups
        ]

    def cost(self, run: RunShape) -> Cost:
        """Of :meth:`passes`, and of the decision."""
        sizes, inputs, tokens = run.sizes, run.inputs, run.num_tokens
        longest = max(span.stop - span.start for span in run.spans)
        cost = Cost(
            below=run.num_layers,
            batch=inputs.batch,
            length=run.window_length,
            ranges=inputs.config.folds,
            running_bytes=sizes.stream_bytes(tokens),
            kept_bytes=tokens * kept_numbers(self.architecture, self) * sizes.itemsize,
        )
        layers = range(run.num_layers)
        if self.config.criterion != "recoverability":
            cost.pass_tokens(layers, tokens)
            cost.batch_bytes = (longest + 1) * sizes.stream_bytes(run.batch_tokens)
            cost.sums_bytes = SMALL_BYTES
            return cost
        # Weights are there before the sums: what they leave is what the run will see as free.
        left = run.free_bytes - sizes.decoder_bytes(run.num_layers)
        stops_of, width = self.stops_of(), sizes.hidden_size
        at_once = self.starts_at_once(left if left > 0 else run.free_bytes)
        cost.pass_tokens(layers, tokens * -(-len(stops_of) // at_once))
        # On a GPU rows of all starts wait until there are enough for one product.
        starts = min(len(stops_of), at_once)
        rows = min(tokens, max(run.batch_tokens, PAIR_FLUSH_TOKENS))
        cost.batch_bytes = (starts + longest) * sizes.stream_bytes(rows)
        cost.sums_bytes = starts * self.start_bytes()
        # One range a fold; read back by fold and start.
        stored = self.start_stored_bytes(inputs.config.engine.ranks)
        cost.commit_bytes = cost.sums_read_bytes = cost.ranges * len(stops_of) * stored
        columns = self.columns or width
        for stops in stops_of.values():
            cost.sums["pairs"] += tokens * pair_flops(width, stops, self.columns)
            # The best ridge by a projection; of the whole cross those about the one before.
            steps = len(RIDGE_GRID) if columns <= PROJECTION_COLUMNS else AROUND
            flops = step_flops(width, stops * columns)
            cost.fits.append(Fits("stream", cost.ranges * steps, flops))
        return cost

    def decide(
        self,
        store: StatisticsStore,
        folds: int,
        device: torch.device,
        advance: Advance = lambda _: None,
    ) -> tuple[tuple[Span, ...], dict[str, Any]]:
        """The spans that go, and the scores behind the decision as plain values.

        ``advance`` is told of every candidate that is scored.
        """
        if self.config.criterion == "recoverability":
            held_out = self._held_out(store, folds, device, advance)
            cost_LB = cost_map(self.architecture.num_layers, held_out)
            spans = choose_spans(cost_LB, self.remove, self._max_spans)
            return spans, {"recoverability": [_row(s, h) for s, h in sorted(held_out.items())]}
        sums = store.total(None, ["scores"])["scores"]
        assert isinstance(sums, ScoreSums)
        scores = sums.mean()
        span = paper_span(scores, self.remove, self.config.protect)
        return (span,), {"scores": [None, *scores[1:-1], None]}

    def _held_out(
        self, store: StatisticsStore, folds: int, device: torch.device, advance: Advance
    ) -> dict[Span, HeldOut]:
        width = self.architecture.hidden_size
        projection_Cr = None
        if self.columns is not None:
            projection_Cr = projection(width, self.columns).to(device)
        stops_of: dict[int, list[int]] = {}
        for span in self.candidates():
            stops_of.setdefault(span.start, []).append(span.stop)
        ids = range(len(store.plan.ranges))
        found: dict[Span, HeldOut] = {}
        around = None  # of the start before: neighbours have about the same
        for start, stops in stops_of.items():
            key = start_key(start)
            parts: list[PairMoments] = []
            for fold in range(folds):
                of_fold = [i for i in ids if fold_of_range(i, folds) == fold]
                sums = store.total(of_fold, [key], device)[key]
                assert isinstance(sums, PairMoments)
                parts.append(sums)
            found |= held_out_of_start(start, stops, parts, projection_Cr, around)
            around = found[Span(start, stops[0])].relative_ridge
            advance(len(stops))
        return found


def _row(span: Span, held_out: HeldOut) -> dict[str, Any]:
    return {
        "span": [span.start, span.stop],
        "cost": lost_log_energy(held_out),
        "residual": held_out.residual / held_out.energy,
        "standard_error": held_out.standard_error / held_out.energy,
        "cut": held_out.cut / held_out.energy,
        "relative_ridge": held_out.relative_ridge,
    }
