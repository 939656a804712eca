"""`ghost` (arXiv 2605.15491), ``x -> x W``, and what has ``rmsnorm(x)`` beside or instead of x.

Legend: C hidden width. Rows are tokens: ``Y_TC = X_TC @ W_CC``, W is (in, out). stream+norm,
``x -> x W + rmsnorm(x) N``, is for what a linear map of x cannot do, which is to divide by the norm
of a token; `norm-linear`, ``x -> x + rmsnorm(x) N``, is what llama.cpp can run. An infinite ridge
is the plain cut, W = I and N = 0. Memory beside the folds: 3 Z^2 float64, Z = C or 2 C.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.ridge import Ridge
from ghost_dist.solver.down_proj import fold_targets
from ghost_dist.solver.least_squares import Fit, fit_least_squares
from ghost_dist.statistics.moments import Moments


def fit_ghost(
    span: str,
    folds: Sequence[Moments],
    ridge: Ridge,
    *,
    norm_eps: float | None = None,
    **options: Any,
) -> tuple[Repair, Fit]:
    """Fit W of one span over all folds of moments with Z = x; see ``fit_least_squares``.

    With ``norm_eps`` W and N, of moments with ``Z = [x, rmsnorm(x)]``, see ``norm_features``. A
    relative ridge is then relative to the median diagonal of each of the two grams, because their
    scales differ by the norm of the stream.
    """
    width = folds[0].cross_ZC.shape[1]
    eye_CC = torch.eye(width, dtype=torch.float64, device=folds[0].cross_ZC.device)
    if norm_eps is None:
        weight_CC, fit = fit_least_squares(span, folds, eye_CC, ridge, **options)
        return Repair(weight_CC), fit
    prior_ZC = torch.cat((eye_CC, torch.zeros_like(eye_CC)))
    map_ZC, fit = fit_least_squares(span, folds, prior_ZC, ridge, blocks=(width, width), **options)
    return Repair(map_ZC[:width], map_ZC[width:], norm_eps=norm_eps), fit


def fit_norm_linear(
    span: str, folds: Sequence[Moments], ridge: Ridge, *, norm_eps: float, **options: Any
) -> tuple[Repair, Fit]:
    """Fit N of ``Y - x ~ rmsnorm(x) N`` from moments with ``Z = [x, rmsnorm(x)]``."""
    width = folds[0].cross_ZC.shape[1]
    zero_CC = folds[0].cross_ZC.new_zeros(width, width)
    map_CC, fit = fit_least_squares(span, fold_targets(folds), zero_CC, ridge, **options)
    return Repair(norm_weight_CC=map_CC, norm_eps=norm_eps), fit
