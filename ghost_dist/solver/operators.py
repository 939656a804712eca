"""What an operator puts in the place of a removed span, whichever operator it is.

Legend: T tokens, C hidden width, F width of the MLP's inner layer, r rank. Rows are tokens:
``Y_TC = X_TC @ W_CC``, W is (in, out); export transposes for ``nn.Linear``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Repair:
    """The stream x at the boundary becomes ``x W + rmsnorm(x) N + x U V + b``, None parts left out.

    Without W (None) the first term is x itself. All float64.

    Attributes
    ----------
    weight_CC
        W, dense.
    norm_weight_CC
        N, of ``rmsnorm(x) = x / sqrt(mean(x^2) + eps)`` without a learned scale.
    low_rank
        U (C, r) and V (r, C).
    bias_C
        b.
    down_FC
        Replaces the down_proj of layer ``start - 1``; its bias, if any, stays.
    """

    weight_CC: Tensor | None = None
    norm_weight_CC: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    bias_C: Tensor | None = None
    down_FC: Tensor | None = None

    @property
    def added_parameters(self) -> int:
        """Numbers that the recovered checkpoint holds on top of the pruned one."""
        parts = (self.weight_CC, self.norm_weight_CC, self.bias_C, *(self.low_rank or ()))
        return sum(part.numel() for part in parts if part is not None)


def apply_repair(repair: Repair, x_TC: Tensor, eps: float = 0.0) -> Tensor:
    """The repaired stream of T rows, in float64; ``down_FC`` acts before and is not applied here.

    Parameters
    ----------
    repair
        Of one span.
    x_TC
        Stream entering layer ``start``, shape (T, C), as the model with ``down_FC`` makes it.
    eps
        Of the RMSNorm of ``norm_weight_CC``.
    """
    x_TC = x_TC.double()
    result_TC = x_TC if repair.weight_CC is None else x_TC @ repair.weight_CC
    if repair.norm_weight_CC is not None:
        scale_T1 = torch.rsqrt(x_TC.square().mean(1, keepdim=True) + eps)
        result_TC = result_TC + (x_TC * scale_T1) @ repair.norm_weight_CC
    if repair.low_rank is not None:
        result_TC = result_TC + (x_TC @ repair.low_rank[0]) @ repair.low_rank[1]
    if repair.bias_C is not None:
        result_TC = result_TC + repair.bias_C
    return result_TC
