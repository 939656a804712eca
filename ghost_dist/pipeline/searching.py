"""Which layers go by ``selection.criterion=search``: removals scored as recovered models.

One dense pass keeps the streams of all boundaries for some windows. From them the operator of any
span is fitted in closed form, once. A removal with its operators is a variant of a sweep, scored by
its KL divergence from the dense model on windows of the fold that nothing here is fitted on.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.checkpoint.architecture import Architecture, check_cut
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.config import CalibrationConfig, Config, SelectionConfig
from ghost_dist.devices import free_bytes
from ghost_dist.durable import fingerprint
from ghost_dist.engines.base import Tokens
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.engines.sweep import Tap, sweep
from ghost_dist.errors import ConfigError, UnsupportedArchitectureError
from ghost_dist.evaluation.scores import window_scores
from ghost_dist.pipeline.inputs import RunInputs, windows_of_folds
from ghost_dist.pipeline.offloading import layers_of
from ghost_dist.pipeline.selecting import rules_of
from ghost_dist.planning.run_shape import RemovalSearch
from ghost_dist.progress import Advance, Reporter
from ghost_dist.run_folder import RunFolder
from ghost_dist.solver.search import (
    Removal,
    Search,
    greedy_evaluations,
    table_as_plain,
    table_from_plain,
)
from ghost_dist.solver.span_selection import fit_start
from ghost_dist.spans import Span, check_spans
from ghost_dist.statistics.pair_sums import PairCollector, PairMoments, start_key

_RIDGE = 1e-2  # relative; of operators within the search
_JUDGED_LENGTH = 512  # tokens of a judging window; those of calibration are cut into such pieces
_SHARE_OF_MEMORY = 0.4  # for dense streams; for streams of variants; for operators
_MOST_VARIANTS = 64  # of a sweep
_OPERATORS_OF_LAYER = 8  # that should have room on the device


@dataclass(frozen=True)
class Effort:
    """How much a search does."""

    rounds: float  # budget, in evaluations of its greedy part
    judged_tokens: int
    fitted_per_channel: int  # tokens

    def fit_windows(self, width: int, length: int) -> int:
        """Windows of a length that operators of a width are fitted on."""
        return -(-self.fitted_per_channel * width // length)

    def judged_windows(self, length: int) -> int:
        """Windows of a length that removals are scored on."""
        return max(1, self.judged_tokens // length)

    def depths(self, windows: int) -> tuple[int, ...]:
        """Judging windows of all removals of a generation, and of the best."""
        return tuple(sorted({max(1, windows // 4), windows}))


EFFORTS = {
    "quick": Effort(1.0, 4096, 8),
    "normal": Effort(2.0, 8192, 16),
    "thorough": Effort(4.0, 16384, 32),
}


def search_shape(config: Config, remove: int, architecture: Architecture) -> RemovalSearch:
    """What a search takes at most."""
    selection, calibration = config.selection, config.calibration
    effort, length = _effort(selection), min(_JUDGED_LENGTH, calibration.window_length)
    pieces = _pieces(calibration)
    of_judge = -(-calibration.windows // config.operator.folds)
    fitted = effort.fit_windows(architecture.hidden_size, calibration.window_length)
    depths = effort.depths(min(of_judge * pieces, effort.judged_windows(length)))
    rules = rules_of(selection, remove, architecture.num_layers)
    budget = math.ceil(effort.rounds * greedy_evaluations(rules, depths))
    if isinstance(selection.effort, int):
        budget = selection.effort
    return RemovalSearch(
        fitted_tokens=min(fitted, calibration.windows - of_judge) * calibration.window_length,
        judged_tokens=budget * length,
        sweeps=math.ceil(len(depths) * effort.rounds * remove),
    )


def search_spans(
    inputs: RunInputs,
    tokens: TokenWindows,
    run: RunFolder,
    reporter: Reporter,
) -> tuple[tuple[Span, ...], dict[str, Any]]:
    """The spans that go, and what was searched as plain values.

    Parameters
    ----------
    inputs, tokens, run, reporter
        Of the run; a search that was stopped goes on from what RUN holds.

    Raises
    ------
    ConfigError
        If the budget is too small, nothing may go, or the dense streams do not fit in memory.
    """
    selection, architecture = inputs.config.selection, inputs.architecture
    assert inputs.remove is not None
    record = record_of(inputs)
    identity = fingerprint(
        {
            "selection": selection.model_dump(mode="json", exclude={"criterion", "spans"}),
            "remove": inputs.remove,
            "model": inputs.model_fingerprint,
            "tokens": tokens.fingerprint,
            "folds": inputs.config.operator.folds,
            **inputs.numerics,
        }
    )
    kept = run.record(record, identity) or {"table": {}}

    def possible(removal: Removal) -> bool:
        try:
            check_cut(architecture, inputs.source.config, _spans(removal))
        except UnsupportedArchitectureError:
            return False
        return True

    shown = 0

    def told(generation: dict[str, Any]) -> None:
        nonlocal shown
        run.finish(record, identity, {"table": table_as_plain(search.table)})
        reporter.event("search-generation", **generation)
        advance(search.evaluations - shown)
        shown = search.evaluations

    with scoring(inputs, tokens, reporter) as score:
        search = Search(
            rules_of(selection, inputs.remove, architecture.num_layers),
            score,
            score.windows.depths,
            budget=selection.effort if isinstance(selection.effort, int) else None,
            effort=_effort(selection).rounds,
            seed=inputs.config.calibration.seed,
            table=table_from_plain(kept["table"]),
            possible=possible,
            after_generation=told,
        )
        with reporter.stage("search", search.budget, "evaluations") as advance:
            found = search.run()
    return _spans(found.removal), {
        "search": {
            "kl": found.score,
            "evaluations": found.evaluations,
            "candidates": found.candidates,
            "judged_tokens": int(score.windows.judged.size),
            "fitted_tokens": int(score.windows.fitted.size),
            "generations": list(found.generations),
        }
    }


def record_of(inputs: RunInputs) -> str:
    """Name of the record of the scores so far, in ``RUN/stages`` until it is forgotten."""
    return f"search-{inputs.remove}"


@contextlib.contextmanager
def scoring(inputs: RunInputs, tokens: TokenWindows, reporter: Reporter) -> Iterator[Scoring]:
    """What scores removals, with the model at hand."""
    windows = Windows.of(inputs, tokens)
    shape = windows.judged.shape
    at_once = _variants_at_once(inputs, shape)
    batch = max(1, inputs.batch * tokens.window_length // shape[1])
    with layers_of(inputs, shape, at_once + 1, batch=batch) as model:
        with reporter.stage("dense streams", int(windows.fitted.size), "tokens") as advance:
            streams = dense_streams(model, windows.fitted, inputs.batch, advance)
        yield Scoring(model, windows, Operators(streams, model), at_once, batch)


@dataclass(frozen=True)
class Windows:
    """What a search fits on and judges by.

    Attributes
    ----------
    fitted
        int32, shape (windows, T).
    judged
        int32, shape (windows, at most T), pieces of others than these, from another fold.
    depths
        Judging windows of many removals, and of few.
    """

    fitted: Tokens
    judged: Tokens
    depths: tuple[int, ...]

    @staticmethod
    def of(inputs: RunInputs, tokens: TokenWindows) -> Windows:
        """Some of the calibration windows, spread over the text."""
        effort, folds = _effort(inputs.config.selection), range(inputs.config.operator.folds)
        length = min(_JUDGED_LENGTH, tokens.window_length)
        others = windows_of_folds(inputs, tokens, folds[:-1])
        of_judge = tokens.tokens[sorted(windows_of_folds(inputs, tokens, folds[-1:]))]
        used = length * _pieces(inputs.config.calibration)
        of_judge = of_judge[:, :used].reshape(-1, length)
        fit_windows = effort.fit_windows(inputs.architecture.hidden_size, tokens.window_length)
        fitted = _spread(others, fit_windows)
        judged = _spread(range(len(of_judge)), effort.judged_windows(length))
        depths = effort.depths(len(judged))
        # The first ones are spread too: those that are scored on no more windows have all of it.
        order = judged[:: len(judged) // depths[0]][: depths[0]]
        order += [window for window in judged if window not in order]
        return Windows(
            tokens.tokens[fitted],
            of_judge[order],
            depths,
        )


@dataclass(frozen=True)
class Scoring:
    """Divergence of recovered models from the dense one; a ``Score`` of a search.

    Attributes
    ----------
    model, windows, operators
        Of the search.
    at_once
        Variants of a sweep.
    batch
        Judging windows of a forward.
    """

    model: LayerwiseModel
    windows: Windows
    operators: Operators
    at_once: int
    batch: int

    def __call__(self, removals: Sequence[Removal], of_windows: range) -> list[list[float]]:
        """KL divergence per removal and window, nats a token; inf where it is not finite."""
        judged = self.windows.judged[of_windows.start : of_windows.stop]
        spans = [_spans(removal) for removal in removals]
        self.operators.fit({span for of_one in spans for span in of_one})
        found: list[list[float]] = []
        for first in range(0, len(spans), self.at_once):
            variants = map(self.operators.variant, spans[first : first + self.at_once])
            of_all = [Variant(), *variants]
            _, *scores = window_scores(self.model, of_all, judged, batch=self.batch)
            found += [[v if math.isfinite(v) else math.inf for v in one.kl] for one in scores]
        return found


class Operators:
    """``ghost`` operators in the model's dtype, by span, each fitted once from dense streams.

    Parameters
    ----------
    streams
        By boundary, (W, T, C).
    model
        Whose they are.
    """

    def __init__(self, streams: Sequence[Tensor], model: LayerwiseModel) -> None:
        self._streams, self._model = streams, model
        self._weights: OrderedDict[Span, Repair] = OrderedDict()
        one = model.hidden_size**2 * model.dtype.itemsize
        self._place, self._most = model.device, 0
        if model.whole:
            self._most = int(_SHARE_OF_MEMORY * free_bytes(model.device)) // one
        if self._most < _OPERATORS_OF_LAYER * model.num_layers:
            self._place = torch.device("cpu")
            self._most = int(_SHARE_OF_MEMORY * free_bytes(self._place)) // one

    def fit(self, spans: Collection[Span]) -> None:
        """Have all of these; those that were not used for longest go where memory is short."""
        stops: dict[int, list[int]] = {}
        for span in sorted(spans):
            if span in self._weights:
                self._weights.move_to_end(span)
            else:
                stops.setdefault(span.start, []).append(span.stop)
        for start, of_start in stops.items():
            for span, weight_CC in self._fit_start(start, of_start).items():
                # nn.Linear's layout in memory, which is how a sweep wants it
                weight_CC = weight_CC.to(self._model.dtype).T.contiguous().T
                self._weights[span] = Repair(weight_CC=weight_CC.to(self._place))
        while len(self._weights) > max(self._most, len(spans)):
            self._weights.popitem(last=False)

    def variant(self, spans: tuple[Span, ...]) -> Variant:
        """A removal with its operators, which were fitted."""
        return Variant(spans, {span: self._weights[span] for span in spans})

    def _fit_start(self, start: int, stops: list[int]) -> dict[Span, Tensor]:
        device = self._model.device
        spans = [Span(start, stop) for stop in stops]
        collector = PairCollector(spans, self._model.hidden_size, device, columns=None)
        for window in range(len(self._streams[0])):
            for boundary in collector.boundaries:
                collector(boundary, window, self._streams[boundary][window].to(device))
        pairs = collector.result()[start_key(start)]
        assert isinstance(pairs, PairMoments)
        return fit_start(start, stops, pairs, _RIDGE)


class _Keep(Tap):
    """Copies the dense streams of every boundary."""

    def __init__(self, kept: Sequence[Tensor]) -> None:
        self._kept = kept

    def stream(self, boundary: int, part: slice, stream_BTC: Tensor) -> None:
        """A batch."""
        self._kept[boundary][part] = stream_BTC.to(self._kept[boundary].device)


def dense_streams(
    model: LayerwiseModel, tokens: Tokens, batch: int, advance: Advance
) -> list[Tensor]:
    """Streams (W, T, C) of every boundary, on the device if they fit there, else on the host.

    Raises
    ------
    ConfigError
        If they fit nowhere.
    """
    shape = (*tokens.shape, model.hidden_size)
    nbytes = (model.num_layers + 1) * math.prod(shape) * model.dtype.itemsize
    place = model.device
    if nbytes + model.bytes_at_once() > _SHARE_OF_MEMORY * free_bytes(place):
        place = torch.device("cpu")
        if nbytes > _SHARE_OF_MEMORY * free_bytes(place):
            raise ConfigError(
                f"selection.criterion=search keeps the streams of {tokens.size:,} tokens at "
                f"{model.num_layers + 1} boundaries, {nbytes / 1e9:.1f} GB, and the host has "
                f"{free_bytes(place) / 1e9:.1f} GB free. Give selection.effort=quick, or another "
                "criterion."
            )
    kept = [
        torch.empty(shape, dtype=model.dtype, device=place) for _ in range(model.num_layers + 1)
    ]
    sweep(
        model,
        [Variant()],
        tokens,
        [_Keep(kept)],
        batch=batch,
        stop=model.num_layers,
        advance=advance,
    )
    return kept


def _spread(windows: Sequence[int], count: int) -> list[int]:
    """So many of them, at equal distances."""
    ordered, count = sorted(windows), min(count, len(windows))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def _pieces(calibration: CalibrationConfig) -> int:
    """Judging windows that one of calibration gives; a piece inside it has no BOS."""
    return 1 if calibration.window_bos else max(1, calibration.window_length // _JUDGED_LENGTH)


def _spans(removal: Removal) -> tuple[Span, ...]:
    return check_spans((Span(layer, layer + 1) for layer in removal), num_layers=1 << 30)


def _effort(selection: SelectionConfig) -> Effort:
    return EFFORTS["normal" if isinstance(selection.effort, int) else selection.effort]


def _variants_at_once(inputs: RunInputs, shape: tuple[int, int]) -> int:
    """Variants of a sweep: all windows of each are held where layers are read one by one."""
    windows = shape[0] if inputs.streaming else inputs.batch
    stream = windows * shape[1] * inputs.architecture.hidden_size * inputs.dtype.itemsize
    free = max(free_bytes(device) for device in (inputs.device, torch.device("cpu")))
    if not inputs.streaming:
        free = free_bytes(inputs.device)
    return max(1, min(_MOST_VARIANTS, int(_SHARE_OF_MEMORY * free) // stream - 1))
