"""Fits on the recovered model's own stream, of one run: a walk with what its operators need."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ghost_dist.calibration.split import check_held_out
from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.pipeline.candidates import Candidate
from ghost_dist.pipeline.fitting import Fitted, RidgeFits, read_down
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.offloading import layers_of
from ghost_dist.pipeline.walking import Refit, Walk
from ghost_dist.progress import Reporter
from ghost_dist.ridge import RelativeRidge
from ghost_dist.solver.least_squares import Detail, Fit
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import Regressors
from ghost_dist.statistics.sums import Sums


def walk_behind(
    inputs: RunInputs,
    tokens: Tokens,
    fold_of_window: Sequence[int],
    model: Any,
    reporter: Reporter,
    fitted: Mapping[Span, Fitted],
    chosen: Candidate,
    known: Mapping[Span, Fit | None] | None = None,
) -> Walk:
    """Fit every span but the first once more, behind fits without the last fold.

    ``model`` is the uncut causal LM, None where layers are read one by one. ``known``: fits of such
    a walk, whose ridges are taken; then all folds are fitted on, and no fit says how good it is.

    Raises
    ------
    NotHeldOutError
        If a fit has seen the last fold.
    """
    judge = inputs.config.folds - 1
    for span, one in fitted.items() if known is None else ():
        check_held_out(one.folds, [judge], f"The stream behind {span}")
    with layers_of(inputs, tokens.shape, 2, model=model) as layers:
        walk = Walk(
            layers=layers,
            tokens=tokens,
            batch=inputs.batch,
            spans=tuple(fitted),
            operators={span: one.repair for span, one in fitted.items()},
            fold_of_window=fold_of_window,
            judge=judge,
            refittable=inputs.refittable,
            refits=_refits(inputs, tuple(fitted), chosen, known),
        )
        with reporter.stage("refit", len(walk.steps), "layers") as advance:
            walk.take(walk.steps, advance)
    return walk


def _refits(
    inputs: RunInputs,
    spans: Sequence[Span],
    chosen: Candidate,
    known: Mapping[Span, Fit | None] | None,
) -> dict[Span, Refit]:
    """How every span but the first is fitted on the recovered stream."""
    refits: dict[Span, Refit] = {}
    ridges = RidgeFits(inputs.architecture.norm_eps)
    judge = None if known is not None else inputs.config.folds - 1

    def refit(span: Span, here: Candidate, kind: Regressors) -> Refit:
        def fit(folds: list[Mapping[str, Sums]]) -> tuple[Repair, Fit | None]:
            down_FC = None
            if kind == "joint":
                down_FC = read_down(
                    inputs.source, inputs.architecture, span.start - 1, inputs.device
                )
            ridges.forget()  # of other sums
            picked = tuple(range(len(folds)))
            detail: Detail = "all" if known is None else "map"
            repair, found = ridges.fit(here, span, folds, down_FC, picked, judge, detail)
            return repair.to(torch.device("cpu")), found

        return Refit(kind, fit)

    for span in spans[1:]:
        here = chosen.at(span, inputs.refittable)
        fit_before = known.get(span) if known is not None else None
        if fit_before is not None and here.ridge == "auto":
            ridge = RelativeRidge(relative=fit_before.relative_ridge)
            here = replace(here, ridge=ridge, shift=0.0)
        if (kind := here.kind()) is not None:
            refits[span] = refit(span, here, kind)
    return refits
