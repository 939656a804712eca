"""What every statistic is: raw float64 sums over tokens, so that parts add up; never a mean.

Symmetric matrices are kept as strips of rows that end at the diagonal: about half of the numbers.
Strip k of an (n, n) matrix has the rows [k h, (k + 1) h) and all columns below (k + 1) h, so the
blocks on the diagonal are whole and nothing needs to be sorted or masked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class ColumnBlock:
    """The columns that one of ``count`` ranks with the same rows keeps; widths differ by one."""

    index: int = 0
    count: int = 1

    def of(self, width: int) -> slice:
        return slice(self.index * width // self.count, (self.index + 1) * width // self.count)


WHOLE = ColumnBlock()


@dataclass(frozen=True)
class Sums:
    """Float64 tensors summed over ``num_tokens`` rows; the base of every kind of statistic."""

    num_tokens: int

    BY_COLUMNS: ClassVar[frozenset[str]] = frozenset()
    """Arrays of which a rank may keep a block of the last axis; of the others it keeps all."""

    SYMMETRIC: ClassVar[frozenset[str]] = frozenset()
    """Arrays that are symmetric matrices where they are whole: half of them is enough to keep."""

    def __add__(self, other: Self) -> Self:
        return self._combine(other, 1)

    def __sub__(self, other: Self) -> Self:
        return self._combine(other, -1)

    def _combine(self, other: Self, sign: int) -> Self:
        theirs = other.arrays()
        return type(self)(
            self.num_tokens + sign * other.num_tokens,
            **{name: torch.add(a, theirs[name], alpha=sign) for name, a in self.arrays().items()},
        )

    def arrays(self) -> dict[str, Tensor]:
        """The tensors by name, without ``num_tokens``."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_tokens"}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def to(self, device: torch.device) -> Self:
        arrays = {name: array.to(device) for name, array in self.arrays().items()}
        return type(self)(self.num_tokens, **arrays)

    def parts(self, block: ColumnBlock) -> dict[str, Tensor]:
        """What a rank keeps of it: the small arrays with the first block, symmetric ones that are
        whole as strips, ``gram_ZZ/0`` and so on."""
        parts: dict[str, Tensor] = {}
        for name, array in self.arrays().items():
            if name in self.SYMMETRIC and block.count == 1:
                parts |= {f"{name}/{k}": strip for k, strip in enumerate(to_strips(array))}
            elif block.index == 0 or name in self.BY_COLUMNS:
                parts[name] = array
        return parts

    @classmethod
    def join(cls, num_tokens: int, blocks: Sequence[Mapping[str, Tensor]]) -> Self:
        """Put together the ``parts`` of all blocks; small arrays are those of the first one."""
        arrays = {}
        for name in dict.fromkeys(part.partition("/")[0] for part in blocks[0]):
            if name not in blocks[0]:
                count = sum(part.startswith(f"{name}/") for part in blocks[0])
                arrays[name] = from_strips([blocks[0][f"{name}/{k}"] for k in range(count)])
            elif name in cls.BY_COLUMNS and len(blocks) > 1:
                arrays[name] = torch.cat([block[name] for block in blocks], -1)
            else:
                arrays[name] = blocks[0][name]
        return cls(num_tokens, **arrays)


STRIPS = 16
LEAST_ROWS = 256
_BLOCK_ROWS = 4096


def rows_of_strips(size: int) -> list[slice]:
    """Rows of every strip of a matrix of ``size`` rows; 16, or fewer of at least 256 rows."""
    height = max(LEAST_ROWS, -(-size // STRIPS))
    return [slice(first, min(first + height, size)) for first in range(0, size, height)]


def num_numbers(size: int) -> int:
    return sum((rows.stop - rows.start) * rows.stop for rows in rows_of_strips(size))


def to_strips(matrix_nn: Tensor) -> list[Tensor]:
    """Views of the strips of a symmetric matrix; what is above them is not looked at."""
    return [matrix_nn[rows, : rows.stop] for rows in rows_of_strips(len(matrix_nn))]


def mirror_(matrix_nn: Tensor) -> None:
    """Copy what is below the diagonal above it: a product ``x' x`` is symmetric up to rounding."""
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
