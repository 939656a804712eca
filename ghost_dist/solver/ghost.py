"""`ghost` (arXiv 2605.15491): ``x -> x W`` in the place of a span, W dense.

Legend: C hidden width. Rows are tokens: ``Y_TC = X_TC @ W_CC``, W is (in, out).

Notes
-----
With ``G = X'X``, ``K = X'Y`` and ``W = I + M`` the operator is

    M = argmin ||X M - (Y - X)||^2 + ridge ||M||^2 = (G + ridge I)^-1 (K - G),

so that an infinite ridge is the plain cut ``W = I``: least squares with the prior I, as
``least_squares.py`` has it. Memory: 6 matrices of C^2 float64 (3 GiB at C = 8192).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.ridge import Ridge
from ghost_dist.solver.least_squares import Fit, FitOptions, fit_least_squares
from ghost_dist.statistics.moments import Moments


def fit_ghost(
    span: str, folds: Sequence[Moments], ridge: Ridge, **options: Unpack[FitOptions]
) -> tuple[Repair, Fit]:
    """Fit W of one span over all folds of moments with Z = x; see ``fit_least_squares``."""
    width = folds[0].cross_ZC.shape[1]
    eye_CC = torch.eye(width, dtype=torch.float64, device=folds[0].cross_ZC.device)
    weight_CC, fit = fit_least_squares(span, folds, eye_CC, ridge, **options)
    return Repair(weight_CC=weight_CC), fit
