"""Sums of absolute values of a span's streams, plain and Hadamard-rotated, for LinearPatch.

Legend: T tokens (rows), C hidden width, B block width. State: four numbers per channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class AbsoluteSums:
    """Column sums of absolute values over ``num_tokens`` rows; all of shape (C,), float64.

    Attributes
    ----------
    num_tokens
        Number of rows T.
    sum_abs_x_C, sum_abs_y_C
        Of X and Y.
    sum_abs_rotated_x_C, sum_abs_rotated_y_C
        Of :func:`rotate` of X and Y.
    """

    num_tokens: int
    sum_abs_x_C: Tensor
    sum_abs_y_C: Tensor
    sum_abs_rotated_x_C: Tensor
    sum_abs_rotated_y_C: Tensor

    def __add__(self, other: AbsoluteSums) -> AbsoluteSums:
        return self._combine(other, 1)

    def __sub__(self, other: AbsoluteSums) -> AbsoluteSums:
        return self._combine(other, -1)

    def _combine(self, other: AbsoluteSums, sign: int) -> AbsoluteSums:
        mine, theirs = self.arrays(), other.arrays()
        return AbsoluteSums(
            self.num_tokens + sign * other.num_tokens,
            **{name: torch.add(mine[name], theirs[name], alpha=sign) for name in mine},
        )

    def arrays(self) -> dict[str, Tensor]:
        """The tensors by name, without ``num_tokens``."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_tokens"}

    @staticmethod
    def from_arrays(num_tokens: int, arrays: Mapping[str, Tensor]) -> AbsoluteSums:
        """Inverse of :meth:`arrays`."""
        return AbsoluteSums(num_tokens, **arrays)


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
