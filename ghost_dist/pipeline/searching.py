"""Which layers go by ``selection.criterion=search``: removals scored as recovered models.

One dense pass keeps the streams of all boundaries for some windows. From them the operators of any
span are fitted in closed form, once, one for each source (of one source, each fold) without it. A
removal with its operators is a variant of a sweep, scored by its KL divergence from the dense model
on windows of every source, with the operators that were fitted without it. What has good scores is
scored again with operators that are fitted one after the other, each on the stream that those
before it have made: which of two removals is better depends on that. Positions count as much as the
dense model is sure there, since the others say less of what a removal does to other text.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.checkpoint.architecture import check_cut
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.devices import free_bytes
from ghost_dist.durable import fingerprint
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.errors import UnsupportedArchitectureError
from ghost_dist.evaluation.scores import window_scores
from ghost_dist.pipeline.cost import SMALL_BYTES, Cost
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.offloading import layers_of
from ghost_dist.pipeline.run_shape import RunShape
from ghost_dist.pipeline.search_effort import Windows, effort_of, repairs
from ghost_dist.pipeline.search_fits import (
    SHARE_OF_MEMORY,
    WALKED_TOKENS,
    DenseFits,
    Doing,
    PlainCuts,
    SequentialFits,
    dense_streams,
)
from ghost_dist.pipeline.targets import comes_to, rules_of
from ghost_dist.progress import Advance, Reporter
from ghost_dist.run_folder import RunFolder
from ghost_dist.solver.removals import Removal, Score
from ghost_dist.solver.search import (
    Search,
    greedy_counts,
    greedy_evaluations,
    search_budget,
    table_as_plain,
    table_from_plain,
)
from ghost_dist.spans import Span, check_spans, pairs_of

_MOST_VARIANTS = 64  # of a sweep
_FAR = "KL of the search {:.4f} nats"
_PARTS_LEFT_OUT = 2  # of the sources, in turn, where streams are walked


Scorer = Callable[[RunInputs, Windows, Reporter, Advance], AbstractContextManager[Score]]
"""Opens what scores removals: :func:`scoring`, or the ranks of a cluster. It tells what it is at,
and evaluations as they come."""


@dataclass(frozen=True)
class SearchShape:
    """What a search takes at most."""

    fitted_tokens: int  # whose dense streams are kept
    walked_tokens: int  # of recovered models, half of whose layers are run
    evaluations: int
    length: int  # tokens of each
    sweeps: int


def search_shape(inputs: RunInputs) -> SearchShape:
    """Of the searches for all amounts; layers go one at a time once, for the largest of them.

    ConfigError where ``selection.effort`` is too little for one.
    """
    selection, calibration = inputs.config.selection, inputs.config.calibration
    effort, sources = effort_of(selection), len(inputs.config.left_out)
    each, width = calibration.windows // sources, inputs.architecture.hidden_size
    judges = effort.judges(calibration, sources, each, repairs(inputs.config))
    amounts = {amount.selection.wanted: amount for amount in (inputs.amount, *inputs.amount.others)}
    rules = [rules_of(amount, inputs.architecture.num_layers) for amount in amounts.values()]
    greedy = [greedy_evaluations(rule, judges, effort.width) for rule in rules]
    given = selection.effort if isinstance(selection.effort, int) else None
    of_rules = (search_budget(r, judges, given, effort.rounds, effort.width) for r in rules)
    budget = sum(of_rules)
    largest = rules.pop(greedy.index(max(greedy)))
    budget -= sum(greedy_evaluations(rule, judges, effort.width, spans=False) for rule in rules)
    more, rounds = map(judges.more, greedy_counts(largest, effort.width)), budget / max(greedy)
    fitted_tokens = walked_tokens = 0
    if repairs(inputs.config):
        fitted = effort.fit_windows(width, calibration.window_length)
        fitted_tokens = min(-(-fitted // sources), each) * sources * calibration.window_length
        share = sum(more) * rounds / len(judges.windows)
        walked_tokens = int(share * min(fitted_tokens, WALKED_TOKENS))
    return SearchShape(
        fitted_tokens=fitted_tokens,
        walked_tokens=walked_tokens,
        evaluations=budget,
        length=effort.length(calibration, sources),
        sweeps=math.ceil((sources + _PARTS_LEFT_OUT + 1) * rounds * largest.remove),
    )


def search_cost(run: RunShape) -> Cost:
    """Of :func:`search_spans`: its budget.

    Every evaluation runs the layers that stay, and on average half of those that go: what
    candidates share of the dense streams is not known before. Fits are few beside that.
    """
    inputs, sizes, layers = run.inputs, run.sizes, range(run.num_layers)
    assert inputs.amount.layers is not None
    search = search_shape(inputs)
    judged_tokens = search.evaluations * search.length
    cost = Cost(
        below=run.num_layers,
        whole=True,
        head=True,
        reads=1 + search.sweeps,
        batch=inputs.batch,
        length=run.window_length,
        scored=judged_tokens,
        # The dense model's stream and a variant's.
        batch_bytes=2 * sizes.stream_bytes(run.batch_tokens),
        sums_bytes=SMALL_BYTES,
        host_bytes=(run.num_layers + 1) * sizes.stream_bytes(search.fitted_tokens),
        running_bytes=sizes.stream_bytes(run.num_tokens),
        leased=True,
    )
    cost.pass_tokens(layers, search.fitted_tokens)
    cost.pass_tokens(layers[inputs.amount.layers // 2 :], judged_tokens)
    cost.pass_tokens(layers[run.num_layers // 2 :], search.walked_tokens)
    return cost


def search_spans(
    inputs: RunInputs,
    tokens: TokenWindows,
    run: RunFolder,
    reporter: Reporter,
    scorer: Scorer | None = None,
) -> tuple[tuple[Span, ...], dict[str, Any]]:
    """The spans that go, and what was searched as plain values; under ``pareto`` all amounts.

    What removals have scored is kept in RUN, whatever amount was searched for: a search that was
    stopped goes on from there, and one for another amount scores what is new to it.
    """
    with Searches(inputs, tokens, run, reporter, scorer) as search:
        spans, found = search(inputs)
        wanted = inputs.config.selection.wanted
        kl_of = {wanted: (spans, found["kl"])}
        for amount in inputs.amount.others:
            if amount.selection.wanted not in kl_of:
                others, of_other = search(inputs.at(amount))
                kl_of[amount.selection.wanted] = others, of_other["kl"]
    if not inputs.amount.others:
        return spans, {"search": found}
    rows: dict[tuple[Span, ...], dict[str, Any]] = {}
    for wanted, (removed, kl) in kl_of.items():
        row = {"spans": pairs_of(removed), "kl": kl, **comes_to(inputs, removed)}
        names = [rows[removed]["wanted"]] if removed in rows else []  # two may come to the same
        rows[removed] = {"wanted": ", ".join([*names, wanted]), **row}
    return spans, {"search": found, "pareto": sorted(rows.values(), key=lambda r: r["removed"])}


class Searches(ExitStack):
    """Searches of one run; what removals have scored is the same for all of them.

    ``scorer``: None is this process. It is opened once there is something to score.
    """

    def __init__(
        self,
        inputs: RunInputs,
        tokens: TokenWindows,
        run: RunFolder,
        reporter: Reporter,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__()
        self._inputs, self._run, self._reporter = inputs, run, reporter
        self._scorer = scorer or scoring
        self._scores: Score | None = None
        self._scored = False  # anything, since it was last looked at
        self._advance: Advance = lambda _: None  # of the search at hand, and ...
        self._shown = 0  # ... its evaluations that were told
        self._windows = Windows.of(inputs, tokens)
        self._record = f"search{'' if repairs(inputs.config) else '-unrepaired'}"
        self._identity = fingerprint(
            {
                "effort": str(effort_of(inputs.config.selection)),
                "score": "sure_kl",
                **({} if repairs(inputs.config) else {"repairs": False}),
                "model": inputs.model_fingerprint,
                "tokens": tokens.fingerprint,
                "left_out": inputs.config.left_out,
                **inputs.numerics,
            }
        )
        kept = run.record(self._record, self._identity) or {"table": {}}
        self._table, self._continues = table_from_plain(kept["table"]), bool(kept["table"])

    def _score(self, removals: Sequence[Removal], windows: Sequence[int]) -> list[list[float]]:
        if self._scores is None:
            opened = self._scorer(self._inputs, self._windows, self._reporter, self._count)
            self._scores = self.enter_context(opened)
        self._scored = True
        return self._scores(removals, windows)

    def _count(self, evaluations: int) -> None:
        self._shown += evaluations
        self._advance(evaluations)

    def __call__(self, inputs: RunInputs) -> tuple[tuple[Span, ...], dict[str, Any]]:
        """The spans of an amount that goes, and how they were found."""
        selection, reporter, remove = inputs.config.selection, self._reporter, inputs.amount.layers
        best = said = math.inf
        about = f"search for {remove} layer{'s' if remove != 1 else ''}"
        self._scored = False

        def possible(removal: Removal) -> bool:
            try:
                check_cut(inputs.architecture, inputs.source.config, _spans(removal))
            except UnsupportedArchitectureError:
                return False
            return True

        def told(generation: dict[str, Any]) -> None:
            nonlocal best, said
            self._run.finish(self._record, self._identity, {"table": table_as_plain(search.table)})
            reporter.event("search-generation", **generation)
            self._count(max(0, search.evaluations - self._shown))
            removed, kl = generation["removed"], generation["score"]
            if len(removed) == remove and kl is not None and kl < best:
                best = kl
                if self._scored:  # else it is known from before
                    said, spans = kl, ", ".join(map(str, _spans(removed)))
                    reporter.say(f"{about}: best so far {spans}, {_FAR.format(kl)}")
            self._scored = False

        search_by = partial(
            Search,
            rules_of(inputs.amount, inputs.architecture.num_layers),
            judges=self._windows.judges,
            budget=selection.effort if isinstance(selection.effort, int) else None,
            effort=effort_of(selection).rounds,
            width=effort_of(selection).width,
            seed=inputs.config.calibration.seed,
            table=self._table,
            possible=possible,
        )
        search = search_by(score=self._score, after_generation=told)
        self._shown = _known(search_by) if self._table else 0
        if self._shown and self._continues:
            reporter.taken(f"search ({self._shown:,} evaluations)")
        name = f"search for {remove}" if inputs.amount.others else "search"
        budget = search.budget
        with reporter.stage(name, budget, "evaluations", self._shown) as self._advance:
            found = search.run()
        self._table, removed = search.table, _spans(found.removal)
        if math.isfinite(said):
            less = f"; the least found, {said:.4f}, is within the standard error of it"
            chosen = f"{', '.join(map(str, removed))}, {_FAR.format(found.score)}"
            reporter.say(
                f"{about}: chosen of {found.candidates:,} that were tried: {chosen} (on "
                "calibration text left out of the fit, weighted by how sure the dense model is)"
                f"{less if said < found.score else ''}"
            )
        return removed, {
            "kl": found.score,
            "kl_left_out": list(found.scores),
            "evaluations": found.evaluations,
            "candidates": found.candidates,
            "judged_tokens": int(self._windows.judged.size),
            "fitted_tokens": int(self._windows.fitted.size) if repairs(inputs.config) else 0,
            "generations": list(found.generations),
        }


class _NotThereError(Exception):
    """A score is not in the table."""


def _known(search_by: Callable[..., Search]) -> int:
    """Evaluations that a search takes from its table before it has anything scored."""
    known: list[dict[str, Any]] = []

    def missing(*_: Any) -> list[list[float]]:
        raise _NotThereError

    with contextlib.suppress(_NotThereError):
        search_by(score=missing, after_generation=known.append).run()
    return known[-1]["evaluations"] if known else 0


@contextlib.contextmanager
def scoring(
    inputs: RunInputs,
    windows: Windows,
    reporter: Reporter,
    scored: Advance = lambda _: None,
    *,
    advance: Advance = lambda _: None,
    on_host: int = 1,
) -> Iterator[Scoring]:
    """What scores removals, with the model at hand.

    ``scored`` hears of evaluations, ``advance`` of tokens on their way.
    ``on_host``: processes of this run on the same host, which all score.
    """
    shape, told = windows.judged.shape, (reporter.doing, scored, advance)
    at_once = _variants_at_once(inputs, shape)
    batch = max(1, inputs.batch * windows.fitted.shape[1] // shape[1])
    with layers_of(inputs, shape, at_once + 1, batch=batch) as model:
        dense: DenseFits | PlainCuts = PlainCuts()
        sequential: SequentialFits | PlainCuts = PlainCuts()
        if repairs(inputs.config):
            with reporter.stage("run dense model", int(windows.fitted.size), "tokens") as passed:

                def ran(tokens: int) -> None:
                    passed(tokens)
                    advance(tokens)

                streams = dense_streams(model, windows.fitted, inputs.batch, ran, on_host)
            dense = DenseFits(streams, windows.source_of, model)
            sequential = SequentialFits(dense, _PARTS_LEFT_OUT, inputs.batch)
        yield Scoring(model, windows, dense, sequential, at_once, batch, *told)


@dataclass(frozen=True)
class Scoring:
    """Divergence of recovered models from the dense one; a ``Score`` of a search.

    Roughly with operators from dense streams, closely with sequential ones.
    """

    model: LayerwiseModel
    windows: Windows
    dense: DenseFits | PlainCuts
    sequential: SequentialFits | PlainCuts
    at_once: int  # variants of a sweep
    batch: int  # judging windows of a forward
    doing: Doing
    scored: Advance
    advance: Advance

    def __call__(self, removals: Sequence[Removal], windows: Sequence[int]) -> list[list[float]]:
        """``Scores.sure_kl`` per removal and window; inf where it is not finite."""
        spans, judges = [_spans(removal) for removal in removals], self.windows.judges
        number_of = np.asarray(windows)
        found, source_of = np.empty((len(removals), len(windows))), number_of % judges.sources
        close = number_of < len(judges.windows)
        for closely, without_of in ((True, source_of % _PARTS_LEFT_OUT), (False, source_of)):
            fits = self.sequential if closely else self.dense
            for without in sorted(set(without_of[close == closely].tolist())):
                columns = np.flatnonzero((close == closely) & (without_of == without))
                judged = self.windows.judged[number_of[columns] % len(judges.windows)]
                for first in range(0, len(spans), self.at_once):
                    rows = slice(first, first + self.at_once)
                    fits.fit(spans[rows], self.doing)
                    variants = [Variant(), *fits.variants(spans[rows], without)]
                    ran = self._counting((len(variants) - 1) * len(judged), judged.size)
                    scores = window_scores(
                        self.model, variants, judged, batch=self.batch, advance=ran
                    )
                    found[rows, columns] = [one.sure_kl for one in scores[1:]]
        found[~np.isfinite(found)] = math.inf
        return found.tolist()

    def _counting(self, evaluations: int, num_tokens: int) -> Advance:
        """Hears of so many tokens on their way, and tells as large a share of the evaluations."""
        passed = 0

        def ran(tokens: int) -> None:
            nonlocal passed
            before, passed = passed * evaluations // num_tokens, passed + tokens
            self.scored(passed * evaluations // num_tokens - before)
            self.advance(tokens)

        return ran


def _spans(removal: Removal) -> tuple[Span, ...]:
    return check_spans((Span(layer, layer + 1) for layer in removal), num_layers=1 << 30)


def _variants_at_once(inputs: RunInputs, shape: tuple[int, int]) -> int:
    """Variants of a sweep: all windows of each are held where layers are read one by one."""
    windows = shape[0] if inputs.streaming else inputs.batch
    stream = windows * shape[1] * inputs.architecture.hidden_size * inputs.dtype.itemsize
    places = {inputs.device, torch.device("cpu")} if inputs.streaming else {inputs.device}
    free = max(map(free_bytes, places))
    return max(1, min(_MOST_VARIANTS, int(SHARE_OF_MEMORY * free) // stream - 1))
