"""Second moments of any regressors Z against targets Y: what the wider operators are solved from.

Legend: T tokens (rows), C hidden width, F width of an MLP's inner layer, Z number of regressors,
V number of combined regressors. Uses:

- ``Z = [A, H]`` (width C + F) for `ghost-joint`, `fold` and `replaceme`: H is the input of the
  down_proj of layer ``start - 1``, and A what enters layer ``start`` less ``H @ down``, so that the
  stream is ``X = A + H @ down``, down being (F, C), in by out. A bias of down_proj belongs to A;
  where A was taken before the MLP's output was added, :func:`shift` puts the bias in;
- ``Z = [x, rmsnorm(x)]`` (width 2 C) for `features: stream+norm`;
- ``Z = H`` with the target ``Y - A`` for healing a single down_proj.

All are raw float64 sums, so ranges, replicas and folds are ``+`` and ``-``, and moments of linear
combinations of Z or of ``Y - Z S`` follow from them without the rows (functions below).

State: Z^2 + Z C float64; for [A, H] at C = 8192, F = 28672 that is 10.9 + 2.4 GB per span and fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ghost_dist.statistics.moments import (
    FLUSH_TOKENS,
    Moments,
    _float32_product,
    has_full_rate_float64,
)

BLOCK_COLUMNS = 4096
"""Regressors per block: bounds the temporaries of one product to T x 4096 and 4096^2 numbers."""


@dataclass(frozen=True)
class WideMoments:
    """Sums over ``num_tokens`` rows; all tensors float64. Row t has the weight ``w_t^2``.

    Attributes
    ----------
    num_tokens
        Number of rows seen, rows of weight 0 included.
    gram_ZZ
        ``sum w^2 z z'``, shape (Z, Z).
    cross_ZC
        ``sum w^2 z y'``, shape (Z, C).
    sum_z_Z, sum_y_C
        ``sum w^2 z`` and ``sum w^2 y``, shapes (Z,) and (C,).
    sumsq_y_C
        ``sum w^2 y^2`` per channel, shape (C,).
    sum_weights_1
        ``sum w^2``, shape (1,): ``num_tokens`` if no row was weighted; what a mean divides by.
    """

    num_tokens: int
    gram_ZZ: Tensor
    cross_ZC: Tensor
    sum_z_Z: Tensor
    sum_y_C: Tensor
    sumsq_y_C: Tensor
    sum_weights_1: Tensor

    def __add__(self, other: WideMoments) -> WideMoments:
        return self._combine(other, 1)

    def __sub__(self, other: WideMoments) -> WideMoments:
        return self._combine(other, -1)

    def _combine(self, other: WideMoments, sign: int) -> WideMoments:
        mine, theirs = self.arrays(), other.arrays()
        return WideMoments(
            self.num_tokens + sign * other.num_tokens,
            **{name: torch.add(mine[name], theirs[name], alpha=sign) for name in mine},
        )

    def arrays(self) -> dict[str, Tensor]:
        """The tensors by name, without ``num_tokens``."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_tokens"}

    def to(self, device: torch.device) -> WideMoments:
        """The same sums on another device."""
        return WideMoments(self.num_tokens, **{n: a.to(device) for n, a in self.arrays().items()})

    @staticmethod
    def from_arrays(num_tokens: int, arrays: Mapping[str, Tensor]) -> WideMoments:
        """Inverse of :meth:`arrays`."""
        return WideMoments(num_tokens, **arrays)


class WideAccumulator:
    """Adds rows to the sums, on the device where the rows are, half of the gram at a time.

    Each call of :meth:`add` is one addition to the sums, so adding window by window gives bitwise
    the same sums whatever number of windows went through the model together. The gram is computed
    in blocks on and below the diagonal: T Z^2 + 2 T Z C FLOP a call.

    Parameters
    ----------
    num_regressors, num_targets
        Z and C.
    device
        Of the rows.
    part, of
        Compute only every ``of``-th block, beginning with ``part``; the results of all parts add
        up to the whole. Splits the work over ranks that hold the same rows (tensor parallelism).
    block_columns
        Regressors per block.
    """

    def __init__(
        self,
        num_regressors: int,
        num_targets: int,
        device: torch.device,
        *,
        part: int = 0,
        of: int = 1,
        block_columns: int = BLOCK_COLUMNS,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        z, c = num_regressors, num_targets
        self._blocks = [slice(lo, min(lo + block_columns, z)) for lo in range(0, z, block_columns)]
        self._part, self._of = part, of
        self._float64_products = has_full_rate_float64(device)
        self._sums = WideMoments(
            0, zeros(z, z), zeros(z, c), zeros(z), zeros(c), zeros(c), zeros(1)
        )
        self._num_tokens = 0

    def add(
        self, regressors: Sequence[Tensor], y_TC: Tensor, weights_T: Tensor | None = None
    ) -> None:
        """Add T rows.

        Parameters
        ----------
        regressors
            Parts of Z side by side, such as (A_TC, H_TF), each of shape (T, width).
        y_TC
            Targets, shape (T, C).
        weights_T
            Factors w of the rows, shape (T,); the sums take their squares. None: all 1.
        """
        sums = self._sums
        z_TZ = regressors[0] if len(regressors) == 1 else torch.cat(tuple(regressors), dim=1)
        if weights_T is None:
            weights_T = y_TC.new_ones(y_TC.shape[0], dtype=torch.float64)
        else:
            # Scaled rows are no bf16 numbers any more: float32 keeps their products accurate.
            wide = torch.float64 if self._float64_products else torch.float32
            weights_T = weights_T.double()
            z_TZ = z_TZ.to(wide) * weights_T.to(wide).unsqueeze(1)
            y_TC = y_TC.to(wide) * weights_T.to(wide).unsqueeze(1)
        product = 0
        for i, rows in enumerate(self._blocks):
            for columns in self._blocks[: i + 1]:
                if product % self._of == self._part:
                    self._add_product(sums.gram_ZZ[rows, columns], z_TZ[:, rows], z_TZ[:, columns])
                product += 1
            if i % self._of == self._part:
                self._add_product(sums.cross_ZC[rows], z_TZ[:, rows], y_TC)
                sums.sum_z_Z[rows].addmv_(z_TZ[:, rows].double().T, weights_T)
        if self._part == 0:
            y64_TC = y_TC.double()
            sums.sum_y_C.addmv_(y64_TC.T, weights_T)
            sums.sumsq_y_C.add_(y64_TC.square().sum(0))
            sums.sum_weights_1.add_(weights_T.square().sum())
            self._num_tokens += y_TC.shape[0]

    def _add_product(self, total_MN: Tensor, a_TM: Tensor, b_TN: Tensor) -> None:
        add_product(total_MN, a_TM, b_TN, float64_products=self._float64_products)

    def result(self) -> WideMoments:
        """The sums so far; the upper half of the gram is filled in from the lower (no copy)."""
        gram_ZZ = self._sums.gram_ZZ
        for i, rows in enumerate(self._blocks):
            for columns in self._blocks[:i]:
                gram_ZZ[columns, rows] = gram_ZZ[rows, columns].T
        return WideMoments.from_arrays(self._num_tokens, self._sums.arrays())


def add_product(total_MN: Tensor, a_TM: Tensor, b_TN: Tensor, *, float64_products: bool) -> None:
    """``total += a' b`` in place, in float64 or through float32 flushed every FLUSH_TOKENS rows."""
    if float64_products:
        total_MN.addmm_(a_TM.double().T, b_TN.double())
    else:
        if a_TM.dtype != b_TN.dtype:  # exact products of two bf16 numbers need both to be bf16
            a_TM, b_TN = a_TM.float(), b_TN.float()
        for first in range(0, len(a_TM), FLUSH_TOKENS):
            rows = slice(first, first + FLUSH_TOKENS)
            total_MN.add_(_float32_product(a_TM[rows].T, b_TN[rows]))


def norm_features(x_TC: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` and ``x / sqrt(mean(x^2) + eps)``, the regressors of `features: stream+norm`.

    The norm's learned scale is left out: the matrix fitted on it would only undo it.
    """
    x32_TC = x_TC.float()
    scale_T1 = torch.rsqrt(x32_TC.square().mean(1, keepdim=True) + eps)
    return x_TC, (x32_TC * scale_T1).to(x_TC.dtype)


def as_wide(moments: Moments) -> WideMoments:
    """The moments of one span as regression moments with ``Z = X``; shares their tensors."""
    return WideMoments(
        num_tokens=moments.num_tokens,
        gram_ZZ=moments.gram_CC,
        cross_ZC=moments.cross_CC,
        sum_z_Z=moments.sum_x_C,
        sum_y_C=moments.sum_y_C,
        sumsq_y_C=moments.sumsq_y_C,
        sum_weights_1=moments.sum_x_C.new_full((1,), float(moments.num_tokens)),
    )


def combine(moments: WideMoments, mix_ZV: Tensor) -> WideMoments:
    """Moments of the regressors ``Z @ mix`` (T, V) against the same targets."""
    return replace(
        moments,
        gram_ZZ=mix_ZV.T @ moments.gram_ZZ @ mix_ZV,
        cross_ZC=mix_ZV.T @ moments.cross_ZC,
        sum_z_Z=mix_ZV.T @ moments.sum_z_Z,
    )


def take(moments: WideMoments, columns: slice) -> WideMoments:
    """Moments of some of the regressors against the same targets; views, no copy."""
    return replace(
        moments,
        gram_ZZ=moments.gram_ZZ[columns, columns],
        cross_ZC=moments.cross_ZC[columns],
        sum_z_Z=moments.sum_z_Z[columns],
    )


def retarget(moments: WideMoments, map_ZC: Tensor) -> WideMoments:
    """Moments of the same regressors against the targets ``Y - Z @ map``."""
    product_ZC = moments.gram_ZZ @ map_ZC
    change_C = (map_ZC * (product_ZC - 2 * moments.cross_ZC)).sum(0)
    return replace(
        moments,
        cross_ZC=moments.cross_ZC - product_ZC,
        sum_y_C=moments.sum_y_C - map_ZC.T @ moments.sum_z_Z,
        sumsq_y_C=moments.sumsq_y_C + change_C,
    )


def shift(moments: WideMoments, shift_Z: Tensor) -> WideMoments:
    """Moments of the regressors ``Z + shift``: a constant row added to every row."""
    weight = moments.sum_weights_1
    half_ZZ = torch.outer(moments.sum_z_Z + 0.5 * weight * shift_Z, shift_Z)
    return replace(
        moments,
        gram_ZZ=moments.gram_ZZ + half_ZZ + half_ZZ.T,
        cross_ZC=moments.cross_ZC + torch.outer(shift_Z, moments.sum_y_C),
        sum_z_Z=moments.sum_z_Z + weight * shift_Z,
    )


def stream_moments(wide: WideMoments, down_FC: Tensor, bias_C: Tensor | None = None) -> Moments:
    """Moments of one span's stream ``X = A + H @ down + bias`` from those of ``[A, H]``.

    Equal to accumulating X itself but for the rounding of X in the model's compute dtype.

    Parameters
    ----------
    wide
        Of ``[A, H]``, width C + F.
    down_FC
        The model's down_proj of layer ``start - 1``, in by out, float64.
    bias_C
        Its bias where A does not hold it already; None: none.
    """
    eye_CC = torch.eye(down_FC.shape[1], dtype=down_FC.dtype, device=down_FC.device)
    stream = combine(wide, torch.cat((eye_CC, down_FC)))
    if bias_C is not None:
        stream = shift(stream, bias_C)
    return Moments(
        num_tokens=stream.num_tokens,
        gram_CC=stream.gram_ZZ,
        cross_CC=stream.cross_ZC,
        sum_x_C=stream.sum_z_Z,
        sum_y_C=stream.sum_y_C,
        sumsq_y_C=stream.sumsq_y_C,
    )
