"""Raw second moments of a span's boundary streams: what every operator is solved from.

Legend: T tokens (rows), C hidden width. ``x_TC`` enters layer ``start``, ``y_TC`` enters layer
``stop`` of the unpruned model. Everything is a float64 sum over tokens plus the number of tokens,
never a mean, so ranges, replicas, resumed parts and cross-validation folds are ``+`` and ``-``.

State: two C x C matrices, 256 MiB at C = 4096, 1 GiB at 8192, 4 GiB at 16384.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

FLUSH_TOKENS = 512
"""Rows summed in float32 before they are added to the float64 sum, where float64 is slow.

Products of two bf16 numbers are exact in float32; the error is in the accumulation, and 512
rows keep its worst entry near 6e-6 of the correlation scale (measured at C = 4096, heavy tails)."""

_FULL_RATE_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""CUDA compute capabilities with float64 at half the float32 rate or better."""


@dataclass(frozen=True)
class Moments:
    """Sums over ``num_tokens`` rows of one span; all tensors float64.

    Attributes
    ----------
    num_tokens
        Number of rows T.
    gram_CC
        ``X'X``, shape (C, C).
    cross_CC
        ``X'Y``, shape (C, C); rows index X, columns index Y.
    sum_x_C, sum_y_C
        Column sums of X and Y, shape (C,).
    sumsq_y_C
        Column sums of squares of Y, shape (C,).
    """

    num_tokens: int
    gram_CC: Tensor
    cross_CC: Tensor
    sum_x_C: Tensor
    sum_y_C: Tensor
    sumsq_y_C: Tensor

    def __add__(self, other: Moments) -> Moments:
        return self._combine(other, 1)

    def __sub__(self, other: Moments) -> Moments:
        return self._combine(other, -1)

    def _combine(self, other: Moments, sign: int) -> Moments:
        mine, theirs = self.arrays(), other.arrays()
        return Moments(
            self.num_tokens + sign * other.num_tokens,
            **{name: torch.add(mine[name], theirs[name], alpha=sign) for name in mine},
        )

    @property
    def hidden_size(self) -> int:
        """Width C of the residual stream."""
        return self.gram_CC.shape[0]

    def arrays(self) -> dict[str, Tensor]:
        """The tensors by name, without ``num_tokens``."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_tokens"}

    def to(self, device: torch.device) -> Moments:
        """The same sums on another device."""
        return Moments(self.num_tokens, **{n: a.to(device) for n, a in self.arrays().items()})

    @staticmethod
    def from_arrays(num_tokens: int, arrays: Mapping[str, Tensor]) -> Moments:
        """Inverse of :meth:`arrays`."""
        return Moments(num_tokens, **arrays)


class MomentsAccumulator:
    """Adds rows to the sums of one span, on the device where the rows are.

    Each call of :meth:`add` is one addition to the sums, so adding window by window gives bitwise
    the same sums whatever number of windows went through the model together.
    """

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        c = hidden_size
        self._float64_products = has_full_rate_float64(device)
        self._sums = Moments(0, zeros(c, c), zeros(c, c), zeros(c), zeros(c), zeros(c))
        self._num_tokens = 0

    def add(self, x_TC: Tensor, y_TC: Tensor) -> None:
        """Add T rows; both of shape (T, C), one floating dtype, on the accumulator's device."""
        sums = self._sums
        x64_TC, y64_TC = x_TC.double(), y_TC.double()
        if self._float64_products:
            sums.gram_CC.addmm_(x64_TC.T, x64_TC)
            sums.cross_CC.addmm_(x64_TC.T, y64_TC)
        else:
            for first in range(0, x_TC.shape[0], FLUSH_TOKENS):
                x_tC = x_TC[first : first + FLUSH_TOKENS]
                y_tC = y_TC[first : first + FLUSH_TOKENS]
                sums.gram_CC.add_(_float32_product(x_tC.T, x_tC))
                sums.cross_CC.add_(_float32_product(x_tC.T, y_tC))
        sums.sum_x_C.add_(x64_TC.sum(0))
        sums.sum_y_C.add_(y64_TC.sum(0))
        sums.sumsq_y_C.add_(y64_TC.square().sum(0))
        self._num_tokens += x_TC.shape[0]

    def result(self) -> Moments:
        """The sums so far (not a copy)."""
        return Moments.from_arrays(self._num_tokens, self._sums.arrays())


def has_full_rate_float64(device: torch.device) -> bool:
    """Whether float64 matrix products are worth their exactness on ``device``."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device) in _FULL_RATE_FLOAT64


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` accumulated in float32, never in TF32 or bf16."""
    if a.dtype in (torch.bfloat16, torch.float16) and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    previous = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return torch.mm(a.float(), b.float())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = previous
