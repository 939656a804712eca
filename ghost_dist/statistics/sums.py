"""What every statistic is: raw float64 sums over tokens, so that parts add up.

Ranges, replicas, resumed parts and cross-validation folds are then ``+`` and ``-``; never a mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sums:
    """Float64 tensors summed over ``num_tokens`` rows; the base of every kind of statistic.

    Attributes
    ----------
    num_tokens
        Number of rows seen, rows of weight 0 included.
    """

    num_tokens: int

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
