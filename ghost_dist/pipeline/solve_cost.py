"""What ``solve`` does and holds: candidates and their fits, the choice by KL, and a walk."""

from collections.abc import Sequence
from dataclasses import replace

from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.sweep import layers_run
from ghost_dist.pipeline.candidates import FINE_SHIFTS, Candidate, searches_ridge, tries_refit
from ghost_dist.pipeline.collectors import SpanCollectors
from ghost_dist.pipeline.cost import AROUND, SMALL_BYTES, Cost, Fits
from ghost_dist.pipeline.run_shape import RunShape
from ghost_dist.pipeline.solving import held_out_tokens
from ghost_dist.pipeline.walking import walk_steps
from ghost_dist.ridge import RelativeRidge
from ghost_dist.solver.least_squares import fit_bytes
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import moments_bytes, moments_flops, num_regressors


def solve_cost(run: RunShape) -> Cost:
    """Of ``Solver.solve``: the choice among candidates, the final fits, and a walk."""
    inputs, sizes, config = run.inputs, run.sizes, run.inputs.config
    operator, candidates, folds = config.operator, run.candidates, config.folds
    cost = Cost(batch=inputs.batch, length=run.window_length, batch_bytes=SMALL_BYTES)
    width = sizes.hidden_size
    sums = [moments_bytes(kind, width, run.inner_size(span)) for span, kind in run.samples]
    cost.fit_bytes = fit_bytes(folds * max(sums, default=0), folds)
    several = len(candidates) > 1
    by_kl, searched = operator.choose == "kl" and several, searches_ridge(operator)
    left_out = config.left_out if by_kl else ((),) if several else ()
    near: list[Candidate] = []
    sequential = operator.refit == "sequential" and len(run.spans) > 1
    parts, judged_behind = (inputs.architecture, inputs.refittable), config.judges_behind_the_fit
    tried_refit = tries_refit(operator, candidates[0], run.spans, run.num_tokens, *parts)
    final_folds = [] if judged_behind else [folds]
    if judged_behind or tried_refit or sequential:
        final_folds.append(folds - 1)  # the last one judges
    for span in run.spans:
        forms = [candidate.at(span, inputs.refittable) for candidate in candidates]
        # The one that is chosen is not known: the dearest.
        best = max(forms, key=lambda form: form.num_regressors(span, inputs.architecture))
        near = [replace(best, shift=best.shift + d) for d in FINE_SHIFTS] if searched else []
        tried = [*forms, *near]
        fitted_on = folds - len(left_out[0]) if left_out else 0
        for _ in left_out:
            cost.fits += _fits(tried, run, span, fitted_on)
            # With the same ridges, and nothing held out to say how good they are.
            tried = [
                replace(form, ridge=RelativeRidge(relative=1.0))
                for form in tried
                if form.operator == best.operator  # others are far behind by then, mostly
            ]
            fitted_on = 0
        # Told where the ridge of least residual was found, if it was chosen by fits.
        final = replace([best, *near][-1], around=1.0 if several else None)
        for fitted_on in final_folds:
            cost.fits += _fits([final], run, span, fitted_on)
    if cost.fits:
        samples = SpanCollectors(run.samples, inputs.architecture)
        cost.sums_read_bytes = inputs.num_ranges * samples.stored_bytes(config.engine.ranks)
    if by_kl:
        tokens, more = held_out_tokens(config), len(left_out) - 1
        of_best = [one for one in candidates if one.operator in (candidates[0].operator, "none")]
        for group, times in ((candidates, 1), (of_best, more), (near, 1 + more)):
            variants = [Variant(), *map(run.variant, group)] if group else []
            cost.pass_tokens(layers_run(variants, run.num_layers), times * tokens)
            cost.scored += len(variants) * times * tokens
        streams = 1 + len(candidates)
        cost.head, cost.batch_bytes = True, streams * sizes.stream_bytes(run.batch_tokens)
        cost.running_bytes = streams * sizes.stream_bytes(tokens)
    if tried_refit:
        once, again = run.variant(candidates[0]), run.variant(candidates[0]).operators
        first = {run.spans[0]: once.operators[run.spans[0]]}  # is not fitted again
        variants = [Variant(), once, Variant(run.spans, {**again, **first})]
        judged = run.window_length * (run.num_windows // folds)
        cost.pass_tokens(layers_run(variants, run.num_layers), judged)
        cost.scored += len(variants) * judged
    if tried_refit or sequential:
        _walk(cost, run)
        if not judged_behind:
            _walk(cost, run, known=True)
    if cost.layers:
        cost.below, cost.whole = run.num_layers, True
    return cost


def _fits(
    forms: Sequence[Candidate],
    run: RunShape,
    span: Span,
    folds: int,
) -> list[Fits]:
    """Of ``RidgeFits.fit`` for candidates at a span in turn, at most.

    Errors at ridges of the grid are known when a candidate has one of them.
    """
    found: list[Fits] = []
    known: set[Candidate] = set()
    width = run.sizes.hidden_size
    for form in forms:
        kind, size = form.kind(), form.num_regressors(span, run.inputs.architecture)
        if kind is None or not size:
            continue
        of_grid = replace(form, ridge="auto", shift=0.0)
        looked_for = form.ridge == "auto" and of_grid not in known
        known.add(of_grid)
        if looked_for and form.around is None:
            found += Fits.of_grid(kind, size, width, folds)
        elif looked_for:
            found.append(Fits.of(kind, size, width, AROUND, folds))
        if not looked_for or form.shift:
            found.append(Fits.of(kind, size, width, 1, folds))
    return found


def _walk(cost: Cost, run: RunShape, *, known: bool = False) -> None:
    """Add what a ``Walk`` does, with ridges that are known; its streams wait in host memory."""
    inputs, sizes, tokens, width = run.inputs, run.sizes, run.num_tokens, run.sizes.hidden_size
    operator = inputs.config.operator
    for step in walk_steps(run.spans, run.spans[1:]):
        if not isinstance(step.group, int):
            continue
        cost.pass_tokens([step.group] * step.passes, tokens)
        cost.moved_bytes += 2 * step.passes * sizes.stream_bytes(tokens)
        if step.does != "refit":
            continue
        inner = inputs.architecture.inner_sizes.get(step.group, 0)
        for span, kind in run.samples:
            if span != step.span:
                continue
            regressors = num_regressors(kind, width, inner)
            cost.sums[kind] += tokens * moments_flops(regressors, width)
            if known:
                cost.fits.append(Fits.of(kind, regressors, width, 1, folds=0))
            elif operator.ridge == "auto":
                cost.fits += Fits.of_grid(kind, regressors, width, folds=1)
            else:
                cost.fits.append(Fits.of(kind, regressors, width, 1, folds=1))
    # Dense, recovered, and one being made.
    cost.host_bytes += 3 * sizes.stream_bytes(tokens)
