"""Operators that refit a down_proj: `ghost-joint`, `fold`.

Legend: C hidden width, F width of the MLP's inner layer. ``X = A + H @ down`` is the stream
entering layer ``start``: H (T, F) the input of the down_proj of layer ``start - 1``, A (T, C) what
the stream is without that product, a bias of down_proj included (``wide.shift`` puts it there).
Y is the stream entering layer ``stop``. All from the moments of ``[A, H]`` against Y.

Notes
-----
The classes of maps are nested, so fitted on the same rows without a ridge the errors are too::

    fold         Y ~ A + H D                 D (F, C)
    ghost-joint  Y ~ A P + H Q               W = P, down = Q P^-1

Each shrinks to the plain cut: D to down, (P, Q) to (I, down). So few samples per feature
give the original model back and not zero. None of this holds where the model norms the MLP's
output before adding it (Gemma 2 and 3): there X is not linear in H.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.errors import GhostDistError
from ghost_dist.ridge import Ridge
from ghost_dist.solver.least_squares import Fit, fit_least_squares
from ghost_dist.statistics.moments import Moments

MAX_CONDITION = 1e6
"""Largest 2-norm condition number of P with which ``Q P^-1`` is formed: stored in bf16 the new
down_proj is wrong by 2^-9, and P multiplies that by up to its condition number."""


class SingularOperatorError(GhostDistError):
    """The operator P of a joint fit cannot be divided out of the down_proj."""

    def __init__(self, span: str, condition: float, limit: float) -> None:
        super().__init__(
            f"The operator P of the joint fit of span {span} has condition number "
            f"{condition:.3g}, above {limit:.3g}, so that down_proj = Q P^-1 would be noise. Give "
            "a larger ridge (operator.ridge={relative: 0.1}), more calibration windows, or use "
            "operator.name=ghost or fold."
        )
        self.span, self.condition, self.limit = span, condition, limit

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.span, self.condition, self.limit))


def fit_ghost_joint(
    span: str, folds: Iterable[Moments], ridge: Ridge, *, down_FC: Tensor, **options: Any
) -> tuple[Repair, Fit]:
    """One least squares over ``[A, H]``: W = P at the boundary and down = Q P^-1 before it.

    The folds are moments of ``[A, H]`` of disjoint windows, ``down_FC`` the model's, float64. A
    relative ridge is relative to the median diagonal of A's and of H's gram, each for itself. Cost:
    3 (C + F)^2 float64 beside the folds.
    """
    inner, width = down_FC.shape
    eye_CC = torch.eye(width, dtype=down_FC.dtype, device=down_FC.device)
    prior_ZC = torch.cat((eye_CC, down_FC))
    map_ZC, fit = fit_least_squares(span, folds, prior_ZC, ridge, blocks=(width, inner), **options)
    p_CC, q_FC = map_ZC[:width], map_ZC[width:]
    if not _condition_bound(p_CC) <= MAX_CONDITION:
        singular_C = torch.linalg.svdvals(p_CC)
        condition = float(singular_C[0] / singular_C[-1])
        if not condition <= MAX_CONDITION:
            raise SingularOperatorError(span, condition, MAX_CONDITION)
    new_down_FC = torch.linalg.solve(p_CC, q_FC, left=False)
    return Repair(weight_CC=p_CC, down_FC=new_down_FC), fit


def _condition_bound(p_CC: Tensor) -> float:
    """At least the 2-norm condition number; much faster on a GPU than singular values.

    ``||P||_2 <= sqrt(||P||_1 ||P||_inf)``, and the same for the inverse.
    """
    inverse_CC, info = torch.linalg.inv_ex(p_CC)
    norms = [torch.linalg.matrix_norm(m, q) for m in (p_CC, inverse_CC) for q in (1, torch.inf)]
    return math.inf if int(info) else float(torch.stack(norms).prod().sqrt())


def fit_fold(
    span: str, folds: Iterable[Moments], ridge: Ridge, *, down_FC: Tensor, **options: Any
) -> tuple[Repair, Fit]:
    """``Y - A ~ H D``: only the down_proj changes, no parameter is added."""
    new_down_FC, fit = fit_least_squares(span, fold_targets(folds), down_FC, ridge, **options)
    return Repair(down_FC=new_down_FC), fit


def fold_targets(folds: Iterable[Moments]) -> Iterator[Moments]:
    """Moments of H against ``Y - A`` from those of ``[A, H]`` against Y, A as wide as Y."""
    for fold in folds:
        width = fold.cross_ZC.shape[1]
        a, h = slice(0, width), slice(width, None)
        # ``retarget`` to Y - A, whose product with Z is there already.
        change_C = fold.gram_ZZ[a, a].diagonal() - 2 * fold.cross_ZC[a].diagonal()
        yield replace(
            fold,
            gram_ZZ=fold.gram_ZZ[h, h],
            cross_ZC=fold.cross_ZC[h] - fold.gram_ZZ[h, a],
            sum_z_Z=fold.sum_z_Z[h],
            sum_y_C=fold.sum_y_C - fold.sum_z_Z[a],
            sumsq_y_C=fold.sumsq_y_C + change_C,
        )
