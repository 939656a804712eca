"""What each stage of a run does, as :class:`Work`: the counts that ``pipeline/`` follows.

Reading: a resident engine loads the model anew in each stage that runs it, from the page cache if
the checkpoint stays there; a streaming one sweeps over the layers once a stage.
"""

from __future__ import annotations

from dataclasses import dataclass

from ghost_dist.planning.engine_choice import EngineKind
from ghost_dist.planning.run_shape import RemovalSearch, RunShape
from ghost_dist.planning.work import FitWork, Work, merged
from ghost_dist.solver.least_squares import num_steps, step_flops
from ghost_dist.statistics.pair_sums import PROJECTION_COLUMNS
from ghost_dist.statistics.sum_costs import moments_flops, pair_flops

VERIFIED_TOKENS = 512
"""Tokens whose logits an export compares."""


@dataclass(frozen=True)
class Cache:
    """Of the host's page cache."""

    share: float  # of the checkpoint that is in it before the run
    keeps: bool  # whether the checkpoint stays in it once it was read


def work_of_stages(
    run: RunShape,
    engine: EngineKind,
    cache: Cache,
    tokens_s: float,
    *,
    keeps_sums: bool = True,
    prefetch: bool = True,
    experts: int | None = None,
) -> dict[str, Work]:
    """Work by stage, in order; stages that a run does not have are left out.

    ``keeps_sums``: those that spans are fitted from stay in memory between fits, as on a CPU.
    ``experts``: routed ones that are held at once; None: all.
    """
    works = {"tokens": Work(other_s=tokens_s)}
    if run.selection is not None:
        works["select"] = _select(run, engine)
    works["calibrate"] = _calibrate(run, engine)
    works["solve"] = _solve(run, engine, keeps_sums)
    works["export"] = _export(run)
    if run.evaluation_tokens:
        works["evaluate"] = _evaluate(run, engine)
    share = cache.share
    for work in works.values():
        work.window_length, work.head_flops = run.window_length, run.sizes.head_flops
        work.overlaps = work.overlaps and prefetch
        if experts is not None:
            _run_twice(work, run, experts)
        if engine != "streaming":  # which reads past the cache
            work.cached_bytes = int(work.read_bytes * share)
        if work.read_bytes and cache.keeps and engine != "streaming":
            share = 1.0
    return works


def _run_twice(work: Work, run: RunShape, experts: int) -> None:
    """Layers whose experts are in parts run twice but for these; counted as tokens more."""
    sizes, length = run.sizes, run.window_length
    work.layers = [
        (layer, round(tokens * (1 + sizes.rest_flops(layer, length) / layer.flops(length))))
        if layer.experts > experts
        else (layer, tokens)
        for layer, tokens in work.layers
    ]


def _select(run: RunShape, engine: EngineKind) -> Work:
    selection = run.selection
    assert selection is not None
    work = Work()
    if selection.search is not None:
        _search(work, run, selection.search, engine)
        return work
    _read(work, run, run.sizes.decoder_stored_bytes(run.num_layers), engine)
    _forward(work, run, range(run.num_layers), run.num_tokens * selection.passes)
    if not selection.stops_of:
        return work
    c = run.sizes.hidden_size
    flops = sum(pair_flops(c, stops, selection.columns) for stops in selection.stops_of.values())
    pairs = sum(selection.stops_of.values())
    merged(work.sums, "pairs", run.num_tokens * pairs, run.num_tokens * flops)
    # One range a fold; read back by fold and start.
    nbytes = run.folds * len(selection.stops_of) * selection.start_stored_bytes
    work.commits, work.commit_bytes, work.store_read_bytes = run.folds, nbytes, nbytes
    columns = selection.columns or c
    for stops in selection.stops_of.values():
        steps = num_steps(run.ridges, run.folds) - 1  # nothing is fitted in the end
        flops = steps * step_flops(c, stops * min(columns, PROJECTION_COLUMNS))
        if columns > PROJECTION_COLUMNS:  # the best ridge and those beside it, on all columns
            flops += 3 * run.folds * step_flops(c, stops * columns)
        equal = max(1, round(flops / step_flops(c, c)))
        work.fits.append(FitWork("stream", c, equal, 0, step_flops(c, c)))
    return work


def _search(work: Work, run: RunShape, search: RemovalSearch, engine: EngineKind) -> None:
    """Every evaluation runs the layers that stay, and on average half of those that go.

    What candidates share of the dense streams is not known before. Fits are few beside that.
    """
    _read(work, run, run.sizes.stored_bytes, engine)
    if engine == "streaming":
        work.read_bytes *= 1 + search.sweeps
    _forward(work, run, range(run.num_layers), search.fitted_tokens)
    layers = range(len(run.removed) // 2, run.num_layers)
    _forward(work, run, layers, search.judged_tokens)
    work.head_tokens = work.divergence_tokens = search.judged_tokens


def _calibrate(run: RunShape, engine: EngineKind) -> Work:
    work = Work()
    if not run.samples:
        return work
    _read(work, run, run.sizes.decoder_stored_bytes(run.last_boundary), engine)
    _forward(work, run, range(run.last_boundary), run.num_tokens)
    _sums(work, run, [(s.kind, s.size) for s in run.samples])
    work.commits, work.commit_bytes = run.num_ranges, run.num_ranges * run.samples_stored_bytes
    return work


def _solve(run: RunShape, engine: EngineKind, keeps_sums: bool) -> Work:
    work = Work()
    if not run.searches:
        return work
    if run.runs_whole_model:
        _read(work, run, run.sizes.stored_bytes, engine)
    # How often candidates are fitted, and on how many folds.
    judges, folds = (run.validation_folds, run.folds - 1) if run.by_kl else (1, run.folds)
    candidates = 0
    for span in run.spans:
        searches = [search for search in run.searches if search.span == span]
        # Every candidate repairs all spans, so those of one span are all.
        candidates = run.plain_cut + run.shifts * sum(search.candidates for search in searches)
        for search in searches if candidates > 1 else ():
            # The whole grid for the ridge of least residual, then one ridge for each candidate; at
            # most, since errors at ridges of the grid are known.
            count = judges * search.candidates
            _fit(work, run, search.kind, search.size, run.ridges, folds, count)
            if run.shifts > 1:
                _fit(work, run, search.kind, search.size, 1, folds, count * run.shifts)
        best = max(searches, key=lambda search: search.size)
        _fit(work, run, best.kind, best.size, 1, folds, judges * run.fine_shifts)
        # Beside the ridge by which it was chosen, then at its own.
        ridges = run.ridges if candidates == 1 else min(run.ridges, 5)
        _fit(work, run, best.kind, best.size, ridges, run.final_folds, 1)
        if run.shifts > 1:
            _fit(work, run, best.kind, best.size, 1, run.final_folds, 1)
    reads = 1 if keeps_sums else 1 + (candidates > 1) + (run.fine_shifts > 0)
    work.store_read_bytes = reads * run.num_ranges * run.samples_stored_bytes
    if run.by_kl and candidates > 1:
        _compare(work, run, candidates)
    if run.refits or run.heal:
        _walk(work, run)
    return work


def _export(run: RunShape) -> Work:
    """Bytes copied, then logits of the recovered model here and of the exported one elsewhere."""
    work = Work(
        read_bytes=run.sizes.stored_bytes,
        load_bytes=run.sizes.stored_bytes + run.kept_stored_bytes,
        load_tensors=2 * run.num_tensors,
        written_bytes=run.kept_stored_bytes,
        processes=1,
        forwards=4,
        head_tokens=2 * VERIFIED_TOKENS,
    )
    kept = [layer for layer in range(run.num_layers) if layer not in run.removed]
    work.layers = [(run.sizes.layers[layer], 2 * VERIFIED_TOKENS) for layer in kept]
    return work


def _evaluate(run: RunShape, engine: EngineKind) -> Work:
    """The dense, the pruned and the recovered model on every corpus."""
    work = Work()
    _read(work, run, run.sizes.stored_bytes, engine)
    tokens = sum(run.evaluation_tokens.values())
    for layers in (range(run.num_layers), _behind(run, cut_only=True), _behind(run)):
        _forward(work, run, layers, tokens)
    work.head_tokens = work.loss_tokens = 3 * tokens
    work.divergence_tokens = 2 * tokens + tokens // 2  # as in _compare
    return work


def _fit(
    work: Work, run: RunShape, kind: str, size: int, ridges: int, folds: int, count: int
) -> None:
    if count and kind != "absolute":
        steps = count * num_steps(ridges, folds)
        flops = step_flops(size, run.sizes.hidden_size)
        work.fits.append(FitWork(kind, size, steps, count, flops))


def _compare(work: Work, run: RunShape, candidates: int) -> None:
    """The dense model and the candidates on the judging folds, in one go, then the fine ones."""
    tokens = run.num_tokens * run.validation_folds // run.folds
    for number, cuts in ((candidates, run.plain_cut), (run.fine_shifts, 0)):
        if not number:
            continue
        _forward(work, run, range(run.num_layers), tokens)
        for candidate in range(number):
            _forward(work, run, _behind(run, cut_only=candidate < cuts), tokens)
        work.head_tokens += (1 + number) * tokens
        work.divergence_tokens += number * tokens
        # The dense distribution is made once a piece; half of what a divergence costs.
        work.divergence_tokens += tokens // 2


def _behind(run: RunShape, *, cut_only: bool = False) -> list[int]:
    """Layers that a cut model runs on streams of its own."""
    first = run.spans[0].start if cut_only else run.first_changed
    return [layer for layer in range(first, run.num_layers) if layer not in run.removed]


def _walk(work: Work, run: RunShape) -> None:
    """Dense and recovered streams side by side, from before the first span, through the host."""
    first = max(0, run.spans[0].start - 1)
    last = run.num_layers if run.heal else run.last_boundary
    _forward(work, run, range(first), run.num_tokens)
    passed = 0
    for layer in range(first, last):
        times = 1 if layer in run.removed else 2 + run.heal
        _forward(work, run, [layer] * times, run.num_tokens)
        passed += times
    for span in run.spans:  # the layer before the span taken apart
        _forward(work, run, [max(0, span.start - 1)], run.num_tokens)
        passed += 1
    work.moved_bytes += 2 * passed * run.sizes.stream_bytes(run.num_tokens)
    for layer in range(run.spans[0].stop, run.num_layers) if run.heal else ():
        if (size := run.inner_sizes.get(layer)) is not None:
            _sums(work, run, [("joint", size)])
            _fit(work, run, "joint", size, run.ridges, 1, 1)


def _sums(work: Work, run: RunShape, samples: list[tuple[str, int]]) -> None:
    for kind, size in samples:
        if kind != "absolute":
            flops = moments_flops(size, run.sizes.hidden_size)
            merged(work.sums, kind, run.num_tokens, run.num_tokens * flops)


def _forward(work: Work, run: RunShape, layers: range | list[int], tokens: int) -> None:
    work.layers += [(run.sizes.layers[layer], tokens) for layer in layers]
    work.forwards += tokens / (run.batch * run.window_length)


def _read(work: Work, run: RunShape, nbytes: int, engine: EngineKind) -> None:
    work.read_bytes = work.load_bytes = nbytes
    work.load_tensors = round(run.num_tensors * nbytes / run.sizes.stored_bytes)
    work.overlaps = engine == "streaming"
