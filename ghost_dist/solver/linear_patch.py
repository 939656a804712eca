"""LinearPatch (arXiv 2505.24680): a diagonal, in the stream's own or in the Hadamard basis.

Legend: C hidden width. ``x -> x W`` with ``W = diag(d)`` or ``W = H diag(d) H``, H the symmetric
orthonormal block Hadamard matrix of ``statistics.span_sums.rotate``, and

    d_j = sum_t |y_tj| / sum_t |x_tj|

over the rows, both rotated for the Hadamard form. The published code averages this ratio over its
batches; the ratio of sums is what that tends to and depends on no batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.errors import ConfigError
from ghost_dist.statistics.span_sums import AbsoluteSums, rotate


def fit_linear_patch(span: str, sums: AbsoluteSums, *, hadamard: bool = False) -> Repair:
    """The patch of one span; a channel that is zero on every row is an error: it has no scale."""
    if hadamard:
        ratio_C = _ratio(span, sums.sum_abs_rotated_x_C, sums.sum_abs_rotated_y_C)
        # H diag(d) H: H is symmetric, so its rows rotated are H once more.
        basis_CC = rotate(torch.eye(len(ratio_C), dtype=torch.float64, device=ratio_C.device))
        return Repair(weight_CC=rotate(basis_CC * ratio_C))
    return Repair(weight_CC=torch.diag(_ratio(span, sums.sum_abs_x_C, sums.sum_abs_y_C)))


def _ratio(span: str, sum_abs_x_C: Tensor, sum_abs_y_C: Tensor) -> Tensor:
    dead = int((sum_abs_x_C == 0).sum())
    if dead:
        raise ConfigError(
            f"linear-patch of span {span}: {dead} of {len(sum_abs_x_C)} channels entering the span "
            "are zero on every calibration row, so they have no scale. Use operator.name=ghost."
        )
    return sum_abs_y_C / sum_abs_x_C
