"""`low-rank`: ``x -> x + x U V`` by reduced-rank regression, its rank chosen on held-out moments.

Legend: C hidden width, T tokens, r rank.

With ``M = (G + D)^-1 K`` the full-rank ridge solution of the change ``Y - X``, the best M of rank r
under the same penalty is ``M_r = M V V'`` with V the r leading eigenvectors of ``M' (G + D) M``
(Izenman 1975; docs/theory.md): ``U = M V``, (C, r), and ``V'``, (r, C). The held-out error of every
rank comes from one pass over the eigenvectors. Cost beside the ridge's: (folds + 1)
eigendecompositions C x C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.errors import ConfigError
from ghost_dist.ridge import AbsoluteRidge, Ridge
from ghost_dist.solver.least_squares import Fit, Regression, solve
from ghost_dist.statistics.moments import Moments

RANK_TOLERANCE = 0.01
"""A rank is good enough if its held-out residual is within this fraction of the best rank's."""


def fit_low_rank(
    span: str,
    folds: Sequence[Moments],
    ridge: Ridge,
    *,
    rank: int | None = None,
    judge: int | None = None,
) -> tuple[Repair, Fit]:
    """Fit (U, V) of one span from moments with Z = X; the ridge is that of full rank.

    ``rank`` None: the least rank whose held-out residual is within RANK_TOLERANCE of the best, at
    most C / 2: from there on a dense W is as small. The fit describes the full-rank solution but
    for its residual and R2 over all channels, which are those of the rank taken.
    """
    width = folds[0].gram_ZZ.shape[0]
    if rank is not None and not 1 <= rank <= width:
        raise ConfigError(
            f"operator.rank={rank} of span {span} must be in 1 to {width}, the hidden size; "
            "operator.name=ghost has full rank."
        )
    eye_CC = torch.eye(width, dtype=torch.float64, device=folds[0].gram_ZZ.device)
    full = Regression(span, folds, eye_CC, judge=judge)
    _, fit = full.fit(ridge)
    if isinstance(ridge, AbsoluteRidge):
        penalty_C = torch.full_like(full.scale_Z, ridge.absolute)
    else:
        penalty_C = fit.relative_ridge * full.scale_Z

    cut = 0.0
    explained_C = torch.zeros_like(full.scale_Z)
    for change in full.judging:
        map_CC, vectors_CC = _leading(span, full.total - change, penalty_C)
        cut += float(change.sumsq_y_C.sum())
        gain_CC = 2 * change.cross_ZC - change.gram_ZZ @ map_CC
        explained_C += ((map_CC @ vectors_CC) * (gain_CC @ vectors_CC)).sum(0)
    explained_R = torch.cat((explained_C.new_zeros(1), explained_C.cumsum(0)))
    residual_R = (cut - explained_R) / (cut if cut > 0 else 1.0)
    if rank is None:
        good = torch.nonzero(residual_R <= (1 + RANK_TOLERANCE) * residual_R.min())
        rank = min(max(1, int(good[0])), max(1, width // 2))

    map_CC, vectors_CC = _leading(span, full.seen, penalty_C)
    v_Cr = vectors_CC[:, :rank]
    u_Cr = map_CC @ v_Cr
    repair = Repair(low_rank=(u_Cr, v_Cr.T.contiguous()))
    residual = float(residual_R[rank])
    unexplained_share = (1 - fit.r2) * (residual / fit.residual if fit.residual > 0 else 1.0)
    fit = replace(fit, residual=residual, r2=1 - unexplained_share)
    return repair, fit


def _leading(span: str, moments: Moments, penalty_C: Tensor) -> tuple[Tensor, Tensor]:
    """M, and the eigenvectors of ``M' (G + D) M`` as columns, largest eigenvalue first."""
    map_CC, _ = solve(span, moments, penalty_C)
    # (G + D) M = K, so the matrix is M'K; symmetric but for rounding.
    explained_CC = map_CC.T @ moments.cross_ZC
    _, vectors_CC = torch.linalg.eigh((explained_CC + explained_CC.T) / 2)
    return map_CC, vectors_CC.flip(1)
