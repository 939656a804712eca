"""Second moments of regressors Z against targets Y: what every operator is solved from.

Legend: T tokens (rows), C hidden width, F width of an MLP's inner layer, Z number of regressors.
``x_TC`` enters layer ``start``, ``y_TC`` enters layer ``stop`` of the unpruned model. Regressors:

- ``Z = x`` (width C): `ghost`;
- ``Z = [x, rmsnorm(x)]`` (width 2 C): `features: stream+norm`;
- ``Z = [A, H]`` (width C + F): `ghost-joint` and `fold`. H is the input of the down_proj of
  layer ``start - 1``, and A what enters layer ``start`` less ``H @ down``, so that
  ``x = A + H @ down``, down being (F, C), in by out; a bias of down_proj belongs to A;
- ``Z = H`` with the target ``Y - A``: refitting a single down_proj.

Everything is a raw float64 sum over tokens plus the number of tokens, never a mean.

State: Z^2 + Z C float64. At C = 4096 the stream's is 256 MiB, at 8192 1 GiB, at 16384 4 GiB;
``[A, H]`` at C = 8192, F = 28672 is 10.9 + 2.4 GB per span and fold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ghost_dist.devices import capability, without_tf32
from ghost_dist.statistics.sums import WHOLE, ColumnBlock, Sums, mirror_

FLUSH_TOKENS = 512
"""Rows summed in float32 before they are added to the float64 sum, where float64 is slow.

Products of two bf16 numbers are exact in float32; the error is in the accumulation, and 512
rows keep its worst entry near 6e-6 of the correlation scale (measured at C = 4096, heavy tails)."""

_FULL_RATE_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""CUDA compute capabilities with float64 at half the float32 rate or better."""

BLOCK_COLUMNS = 4096
"""Regressors per block: bounds the temporaries of one product to T x 4096 and 4096^2 numbers."""


@dataclass(frozen=True)
class Moments(Sums):
    """Sums over ``num_tokens`` rows; all tensors float64."""

    gram_ZZ: Tensor  # sum z z'
    cross_ZC: Tensor  # sum z y'
    sum_z_Z: Tensor  # sum z, and of y
    sum_y_C: Tensor
    sumsq_y_C: Tensor  # sum y^2

    BY_COLUMNS: ClassVar[frozenset[str]] = frozenset({"gram_ZZ", "cross_ZC"})
    SYMMETRIC: ClassVar[frozenset[str]] = frozenset({"gram_ZZ"})


class MomentsAccumulator:
    """Adds rows to the sums, on the device where the rows are, half of the gram at a time.

    Each call of :meth:`add` is one addition, so the sums do not depend on the batch. The whole gram
    takes blocks on and below the diagonal: T Z^2 + 2 T Z C FLOP a call. A rank that keeps one of n
    column blocks has no use of the symmetry: (2 T Z^2 + 2 T Z C) / n.
    """

    def __init__(
        self,
        num_regressors: int,
        num_targets: int,
        device: torch.device,
        *,
        block: ColumnBlock = WHOLE,
    ) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        z, c = num_regressors, num_targets
        firsts = range(0, z, BLOCK_COLUMNS)
        self._blocks = [slice(first, min(first + BLOCK_COLUMNS, z)) for first in firsts]
        self._whole, self._columns_Z, self._columns_C = block.count == 1, block.of(z), block.of(c)
        self._add_product = partial(add_product, float64_products=has_full_rate_float64(device))
        kept_z = self._columns_Z.stop - self._columns_Z.start
        kept_c = self._columns_C.stop - self._columns_C.start
        self._sums = Moments(0, zeros(z, kept_z), zeros(z, kept_c), zeros(z), zeros(c), zeros(c))
        self._num_tokens = 0

    def add(self, regressors: Sequence[Tensor], y_TC: Tensor) -> None:
        """Add T rows: parts of Z side by side, such as (A_TC, H_TF), and targets."""
        sums = self._sums
        z_TZ = regressors[0] if len(regressors) == 1 else torch.cat(tuple(regressors), dim=1)
        ones_T = y_TC.new_ones(y_TC.shape[0], dtype=torch.float64)
        for i, rows in enumerate(self._blocks):
            if self._whole:
                for columns in self._blocks[: i + 1]:
                    self._add_product(sums.gram_ZZ[rows, columns], z_TZ[:, rows], z_TZ[:, columns])
            else:
                self._add_product(sums.gram_ZZ[rows], z_TZ[:, rows], z_TZ[:, self._columns_Z])
            self._add_product(sums.cross_ZC[rows], z_TZ[:, rows], y_TC[:, self._columns_C])
            sums.sum_z_Z[rows].addmv_(z_TZ[:, rows].double().T, ones_T)
        y64_TC = y_TC.double()
        sums.sum_y_C.addmv_(y64_TC.T, ones_T)
        sums.sumsq_y_C.add_(y64_TC.square().sum(0))
        self._num_tokens += y_TC.shape[0]

    def result(self) -> Moments:
        """The sums so far; the upper half of a whole gram is filled in from the lower (no copy)."""
        if self._whole:
            mirror_(self._sums.gram_ZZ)
        return replace(self._sums, num_tokens=self._num_tokens)


def add_product(
    total_MN: Tensor,
    a_TM: Tensor,
    b_TN: Tensor,
    *,
    float64_products: bool,
    flush_tokens: int = FLUSH_TOKENS,
) -> None:
    """``total += a' b`` in place, in float64 or through float32 flushed every so many rows."""
    if float64_products:
        total_MN.addmm_(a_TM.double().T, b_TN.double())
    else:
        if a_TM.dtype != b_TN.dtype:  # exact products of two bf16 numbers need both to be bf16
            a_TM, b_TN = a_TM.float(), b_TN.float()
        for first in range(0, len(a_TM), flush_tokens):
            rows = slice(first, first + flush_tokens)
            total_MN.add_(float32_product(a_TM[rows].T, b_TN[rows]))


def has_full_rate_float64(device: torch.device) -> bool:
    """Whether float64 matrix products are worth their exactness on ``device``."""
    if device.type != "cuda":
        return True
    return capability(device) in _FULL_RATE_FLOAT64


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` accumulated in float32, never in TF32 or bf16."""
    if a.dtype in (torch.bfloat16, torch.float16) and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    with without_tf32():
        return torch.mm(a.float(), b.float())


def norm_features(x_TC: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` and ``x / sqrt(mean(x^2) + eps)``; a learned scale would only be undone by the fit."""
    x32_TC = x_TC.float()
    scale_T1 = torch.rsqrt(x32_TC.square().mean(1, keepdim=True) + eps)
    return x_TC, (x32_TC * scale_T1).to(x_TC.dtype)


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
    """Moments of a span's stream ``x = A + H @ down``, unrounded, from those of ``[A, H]``."""
    eye_CC = torch.eye(down_FC.shape[1], dtype=down_FC.dtype, device=down_FC.device)
    mix_ZC = torch.cat((eye_CC, down_FC))
    return replace(
        joint,
        gram_ZZ=mix_ZC.T @ joint.gram_ZZ @ mix_ZC,
        cross_ZC=mix_ZC.T @ joint.cross_ZC,
        sum_z_Z=mix_ZC.T @ joint.sum_z_Z,
    )
