"""Moments of linear combinations of Z, or of ``Y - Z S``, from those of Z and Y: no rows needed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ghost_dist.statistics.moments import Moments


def combine(moments: Moments, mix_ZV: Tensor) -> Moments:
    """Moments of the regressors ``Z @ mix`` (T, V) against the same targets."""
    return replace(
        moments,
        gram_ZZ=mix_ZV.T @ moments.gram_ZZ @ mix_ZV,
        cross_ZC=mix_ZV.T @ moments.cross_ZC,
        sum_z_Z=mix_ZV.T @ moments.sum_z_Z,
    )


def take(moments: Moments, columns: slice) -> Moments:
    """Moments of some of the regressors against the same targets; views, no copy."""
    return replace(
        moments,
        gram_ZZ=moments.gram_ZZ[columns, columns],
        cross_ZC=moments.cross_ZC[columns],
        sum_z_Z=moments.sum_z_Z[columns],
    )


def retarget(moments: Moments, map_ZC: Tensor) -> Moments:
    """Moments of the same regressors against the targets ``Y - Z @ map``."""
    product_ZC = moments.gram_ZZ @ map_ZC
    change_C = (map_ZC * (product_ZC - 2 * moments.cross_ZC)).sum(0)
    return replace(
        moments,
        cross_ZC=moments.cross_ZC - product_ZC,
        sum_y_C=moments.sum_y_C - map_ZC.T @ moments.sum_z_Z,
        sumsq_y_C=moments.sumsq_y_C + change_C,
    )


def stream_moments(joint: Moments, down_FC: Tensor) -> Moments:
    """Moments of one span's stream ``x = A + H @ down`` from those of ``[A, H]``.

    Equal to accumulating x itself but for the rounding of x in the model's compute dtype.
    """
    eye_CC = torch.eye(down_FC.shape[1], dtype=down_FC.dtype, device=down_FC.device)
    return combine(joint, torch.cat((eye_CC, down_FC)))
