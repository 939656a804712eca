"""Sums of absolute values of a span's streams, plain and Hadamard-rotated, for LinearPatch.

Legend: T tokens (rows), C hidden width, B block width. State: four numbers per channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ghost_dist.statistics.sums import Sums


@dataclass(frozen=True)
class AbsoluteSums(Sums):
    """Column sums of absolute values over ``num_tokens`` rows; all of shape (C,), float64."""

    sum_abs_x_C: Tensor
    sum_abs_y_C: Tensor
    sum_abs_rotated_x_C: Tensor  # of rotate(x)
    sum_abs_rotated_y_C: Tensor


def absolute_sums(x_TC: Tensor, y_TC: Tensor) -> AbsoluteSums:
    """The sums over the rows of one window; both streams of shape (T, C)."""

    def column_sums(stream_TC: Tensor) -> Tensor:
        return stream_TC.abs().sum(0, dtype=torch.float64)

    return AbsoluteSums(
        x_TC.shape[0],
        column_sums(x_TC),
        column_sums(y_TC),
        column_sums(rotate(x_TC.float())),
        column_sums(rotate(y_TC.float())),
    )


def rotate(rows_TC: Tensor) -> Tensor:
    """``rows @ H`` with the orthonormal, symmetric block Hadamard matrix of width C.

    H is block diagonal with Sylvester-Hadamard blocks of width B, the largest power of two that
    divides C: one block where C is a power of two, the identity where C is odd. Applying it twice
    gives the rows back. Cost T C log2(B) additions.
    """
    num_rows, width = rows_TC.shape
    block = width & -width
    # Axes: rows, blocks, then one of length 2 per bit of the index within the block; the
    # transform is (a, b) -> (a + b, a - b) along each of these bits.
    rotated = rows_TC
    half = 1
    while half < block:
        pairs = rotated.reshape(num_rows, width // (2 * half), 2, half)
        low, high = pairs.unbind(2)
        rotated = torch.stack((low + high, low - high), dim=2)
        half *= 2
    return rotated.reshape(num_rows, width) / math.sqrt(block)
