"""The ghost operator of one span (arXiv 2605.15491), its ridge chosen on held-out moments.

Legend: C hidden width, T tokens. Rows are tokens: ``Y_TC = X_TC @ W_CC``, W is (in, out).

Notes
-----
With ``G = X'X``, ``K = X'Y`` and ``W = I + M`` the operator is

    M = argmin ||X M - (Y - X)||^2 + ridge ||M||^2 = (G + ridge I)^-1 (K - G),

so that an infinite ridge is the plain cut ``W = I``: least squares with the prior I, as
``least_squares.py`` has it. Memory: 6 matrices of C^2 float64 (3 GiB at C = 8192).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ghost_dist.config import AbsoluteRidge, RelativeRidge
from ghost_dist.solver.least_squares import (
    QUANTILES,
    RIDGE_GRID,
    Fit,
    condition_number,
    fit_least_squares,
    map_error,
    solve,
)
from ghost_dist.spans import Span
from ghost_dist.statistics.moments import Moments
from ghost_dist.statistics.wide import as_wide, retarget

__all__ = [
    "QUANTILES",
    "RIDGE_GRID",
    "Fit",
    "condition_number",
    "fit_ghost",
    "solve_ghost",
    "squared_error",
]


def fit_ghost(
    span: Span,
    folds: Sequence[Moments],
    ridge: str | RelativeRidge | AbsoluteRidge,
) -> tuple[Tensor, Fit]:
    """Solve the operator of one span over all folds and measure it held out.

    Parameters
    ----------
    span
        Named in errors.
    folds
        Moments of disjoint windows, at least two; their sum is what the operator is fitted on.
    ridge
        ``"auto"``: the grid value of least held-out residual; or a given one.

    Returns
    -------
    operator_CC, fit
        W of shape (C, C), float64, on the moments' device.

    Raises
    ------
    SingularGramError
        If no ridge asked for gives a Cholesky factor.
    ConfigError
        If there are fewer than two folds.
    """
    eye_CC = torch.eye(len(folds[0].gram_CC), dtype=torch.float64, device=folds[0].gram_CC.device)
    operator_CC, _, fit = fit_least_squares(
        str(span), [as_wide(fold) for fold in folds], eye_CC, ridge
    )
    return operator_CC, fit


def solve_ghost(span: Span, moments: Moments, ridge: float) -> tuple[Tensor, Tensor]:
    """W = I + (G + ridge I)^-1 (K - G), and the lower Cholesky factor; both (C, C) float64.

    Raises
    ------
    SingularGramError
        If ``G + ridge I`` is not positive definite in float64.
    """
    gram_CC = moments.gram_CC
    eye_CC = torch.eye(len(gram_CC), dtype=torch.float64, device=gram_CC.device)
    penalty_C = gram_CC.new_full((len(gram_CC),), ridge)
    change_CC, _, factor_CC = solve(str(span), retarget(as_wide(moments), eye_CC), penalty_C)
    return change_CC + eye_CC, factor_CC


def squared_error(moments: Moments, operator_CC: Tensor | None = None) -> Tensor:
    """Per output channel ``||Y - X W||^2`` over the moments' rows, shape (C,); W = I if None."""
    if operator_CC is None:
        diagonal_C = moments.gram_CC.diagonal()
        return moments.sumsq_y_C - 2 * moments.cross_CC.diagonal() + diagonal_C
    return map_error(as_wide(moments), operator_CC)
