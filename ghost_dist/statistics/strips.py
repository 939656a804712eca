"""A symmetric matrix as strips of rows that end at the diagonal: about half of its numbers.

Strip k of an (n, n) matrix has the rows [k h, (k + 1) h) and all columns below (k + 1) h, so the
blocks on the diagonal are whole and nothing needs to be sorted or masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STRIPS = 16
LEAST_ROWS = 256
_BLOCK_ROWS = 4096


def rows_of_strips(size: int) -> list[slice]:
    """Rows of every strip of a matrix of ``size`` rows; 16, or fewer of at least 256 rows."""
    height = max(LEAST_ROWS, -(-size // STRIPS))
    return [slice(first, min(first + height, size)) for first in range(0, size, height)]


def num_numbers(size: int) -> int:
    """Numbers in all strips of a matrix of ``size`` rows."""
    return sum((rows.stop - rows.start) * rows.stop for rows in rows_of_strips(size))


def to_strips(matrix_nn: Tensor) -> list[Tensor]:
    """Views of the strips of a symmetric matrix; what is above them is not looked at."""
    return [matrix_nn[rows, : rows.stop] for rows in rows_of_strips(len(matrix_nn))]


def mirror_(matrix_nn: Tensor) -> None:
    """Copy what is below the diagonal above it, in place: symmetric bit by bit.

    A product ``x' x`` is so only up to rounding.
    """
    for first in range(0, len(matrix_nn), _BLOCK_ROWS):
        rows = slice(first, first + _BLOCK_ROWS)
        matrix_nn[:first, rows] = matrix_nn[rows, :first].T
        diagonal = matrix_nn[rows, rows]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)


def from_strips(strips: Sequence[Tensor]) -> Tensor:
    """The whole matrix, symmetric bit by bit."""
    size = strips[-1].shape[-1]
    matrix_nn = torch.empty(size, size, dtype=strips[0].dtype, device=strips[0].device)
    for rows, strip in zip(rows_of_strips(size), strips, strict=True):
        if strip.shape != (rows.stop - rows.start, rows.stop):
            raise ValueError(f"a strip has the shape {tuple(strip.shape)}")
        matrix_nn[rows, : rows.stop] = strip
        matrix_nn[: rows.start, rows] = strip[:, : rows.start].T
    return matrix_nn
