"""Fits on the recovered model's own stream, of one run: a walk with what its operators need."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from ghost_dist.calibration.split import check_held_out
from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.pipeline.candidates import Candidate
from ghost_dist.pipeline.fitting import Fitted, RidgeFits, read_down
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.offloading import layers_of
from ghost_dist.pipeline.texts import fold_of_window
from ghost_dist.pipeline.walking import Refit, Walk
from ghost_dist.progress import Reporter
from ghost_dist.solver.least_squares import Detail, Fit
from ghost_dist.spans import Span
from ghost_dist.statistics.moments import Moments


def walk_behind(
    inputs: RunInputs,
    tokens: TokenWindows,
    reporter: Reporter,
    fitted: Mapping[Span, Fitted],
    chosen: Candidate,
    known: Mapping[Span, Fit | None] | None = None,
) -> Walk:
    """Fit every span but the first once more, behind fits without the last fold.

    ``known``: fits of such a walk, whose ridges are taken; then all folds are fitted on, and no fit
    says how good it is.

    Raises
    ------
    NotHeldOutError
        If a fit has seen the last fold.
    """
    judge = inputs.config.folds - 1
    for span, one in fitted.items() if known is None else ():
        check_held_out(one.folds, [judge], f"The stream behind {span}")
    with layers_of(inputs, tokens.tokens.shape, 2) as layers:
        walk = Walk(
            layers=layers,
            tokens=tokens.tokens,
            batch=inputs.batch,
            spans=tuple(fitted),
            operators={span: one.repair for span, one in fitted.items()},
            fold_of_window=fold_of_window(inputs, tokens),
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
    architecture, refits = inputs.architecture, dict[Span, Refit]()
    judge = inputs.config.folds - 1 if known is None else None
    detail: Detail = "all" if known is None else "map"

    def fit(here: Candidate, span: Span, folds: Sequence[Moments]) -> tuple[Repair, Fit | None]:
        down_FC = None
        if here.kind() == "joint":
            down_FC = read_down(inputs.source, architecture, span.start - 1, inputs.device)
        ridges, picked = RidgeFits(architecture.norm_eps), tuple(range(len(folds)))
        repair, found = ridges.fit(here, span, folds, down_FC, picked, judge, detail)
        return repair.to(torch.device("cpu")), found

    for span in spans[1:]:
        here = chosen.at(span, inputs.refittable).with_ridge_of((known or {}).get(span))
        if (kind := here.kind()) is not None:
            refits[span] = Refit(kind, partial(fit, here, span))
    return refits
