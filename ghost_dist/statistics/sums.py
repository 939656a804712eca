"""What every statistic is: raw float64 sums over tokens, so that parts add up.

Ranges, replicas, resumed parts and cross-validation folds are then ``+`` and ``-``; never a mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class ColumnBlock:
    """Block ``index`` of ``count``: the columns that one of several ranks with the same rows keeps.

    The blocks' widths differ by at most one column.
    """

    index: int = 0
    count: int = 1

    def of(self, width: int) -> slice:
        """The block's columns of a matrix of this width."""
        return slice(self.index * width // self.count, (self.index + 1) * width // self.count)


WHOLE = ColumnBlock()


@dataclass(frozen=True)
class Sums:
    """Float64 tensors summed over ``num_tokens`` rows; the base of every kind of statistic."""

    num_tokens: int  # rows of weight 0 included

    BY_COLUMNS: ClassVar[frozenset[str]] = frozenset()
    """Arrays of which a rank may keep a block of the last axis; of the others it keeps all."""

    SYMMETRIC: ClassVar[frozenset[str]] = frozenset()
    """Arrays that are symmetric matrices where they are whole: half of them is enough to keep."""

    def __add__(self, other: Self) -> Self:
        return self._combine(other, 1)

    def __sub__(self, other: Self) -> Self:
        return self._combine(other, -1)

    def _combine(self, other: Self, sign: int) -> Self:
        mine, theirs = self.arrays(), other.arrays()
        return type(self)(
            self.num_tokens + sign * other.num_tokens,
            **{name: torch.add(mine[name], theirs[name], alpha=sign) for name in mine},
        )

    def arrays(self) -> dict[str, Tensor]:
        """The tensors by name, without ``num_tokens``."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_tokens"}

    def to(self, device: torch.device) -> Self:
        """The same sums on another device."""
        return type(self).from_arrays(
            self.num_tokens, {name: array.to(device) for name, array in self.arrays().items()}
        )

    @classmethod
    def from_arrays(cls, num_tokens: int, arrays: Mapping[str, Tensor]) -> Self:
        """Inverse of :meth:`arrays`."""
        return cls(num_tokens, **arrays)

    @classmethod
    def join(cls, num_tokens: int, blocks: Sequence[Mapping[str, Tensor]]) -> Self:
        """Put together the arrays of all column blocks, in their order.

        Arrays that are not kept by columns are those of the first block.
        """
        arrays = {
            name: torch.cat([block[name] for block in blocks], -1)
            if name in cls.BY_COLUMNS and len(blocks) > 1
            else array
            for name, array in blocks[0].items()
        }
        return cls.from_arrays(num_tokens, arrays)
