"""`features: stream+norm`: ``x -> x W + rmsnorm(x) N``, two matrices in the place of a span.

Legend: C hidden width. The removed layers read the stream through RMSNorm; a linear map of x cannot
divide by a token's norm, so the normed stream is a regressor of its own (``wide.norm_features``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.ridge import Ridge
from ghost_dist.solver.least_squares import Fit, FitOptions, fit_least_squares
from ghost_dist.statistics.moments import Moments


def fit_stream_norm(
    span: str,
    folds: Sequence[Moments],
    ridge: Ridge,
    *,
    norm_eps: float = 0.0,
    **options: Unpack[FitOptions],
) -> tuple[Repair, Fit]:
    """Fit (W, N), shrunk to (I, 0), from moments with ``Z = [x, rmsnorm(x)]``, width 2 C.

    A relative ridge is relative to the median diagonal of x's and of rmsnorm(x)'s gram, each for
    itself, because their scales differ by the norm of the stream. Cost: 12 C^2 float64 beside the
    folds.
    """
    width = folds[0].cross_ZC.shape[1]
    eye_CC = torch.eye(width, dtype=torch.float64, device=folds[0].cross_ZC.device)
    prior_ZC = torch.cat((eye_CC, torch.zeros_like(eye_CC)))
    map_ZC, fit = fit_least_squares(span, folds, prior_ZC, ridge, blocks=(width, width), **options)
    repair = Repair(weight_CC=map_ZC[:width], norm_weight_CC=map_ZC[width:], norm_eps=norm_eps)
    return repair, fit
