"""What is put in the place of a removed span, whichever operator it is.

Legend: T tokens, C hidden width, F width of the MLP's inner layer. Rows are tokens:
``Y_TC = X_TC @ W_CC``, W is (in, out); export transposes for ``nn.Linear``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class Repair:
    """The stream x at the boundary becomes ``x W + rmsnorm(x) N``; float64 as solved."""

    weight_CC: Tensor | None = None  # None: x itself; others: no such term
    norm_weight_CC: Tensor | None = None
    down_FC: Tensor | None = None  # replaces the down_proj of layer start - 1; its bias stays
    norm_eps: float = 0.0

    def boundary_parts(self) -> dict[str, Tensor]:
        """What acts at the boundary, by name: matrices (in, out)."""
        parts = {"linear": self.weight_CC, "norm_linear": self.norm_weight_CC}
        return {name: part for name, part in parts.items() if part is not None}

    def parts(self) -> dict[str, Tensor]:
        parts = self.boundary_parts()
        return parts if self.down_FC is None else {**parts, "down": self.down_FC}

    @staticmethod
    def from_parts(parts: Mapping[str, Tensor], norm_eps: float = 0.0) -> Repair:
        weight_CC, norm_weight_CC, down_FC = map(parts.get, ("linear", "norm_linear", "down"))
        return Repair(weight_CC, norm_weight_CC, down_FC, norm_eps)

    def stored(self, dtype: torch.dtype, down_dtype: torch.dtype) -> Repair:
        parts = {
            name: part.to(down_dtype if name == "down" else dtype)
            for name, part in self.parts().items()
        }
        return Repair.from_parts(parts, self.norm_eps)

    def to(self, device: torch.device) -> Repair:
        moved = {name: part.to(device) for name, part in self.parts().items()}
        return Repair.from_parts(moved, self.norm_eps)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the parts at the boundary; None if there are none."""
        return next((part.dtype for part in self.boundary_parts().values()), None)

    @property
    def added_parameters(self) -> int:
        """Numbers that the recovered checkpoint holds on top of the pruned one."""
        return sum(part.numel() for part in self.boundary_parts().values())


def apply_repair(repair: Repair, x_TC: Tensor) -> Tensor:
    """The repaired stream (..., C), computed operation by operation as the exported file does."""
    if repair.dtype is None:
        return x_TC
    x_TC = x_TC.to(repair.dtype)
    y_TC = x_TC if repair.weight_CC is None else linear(x_TC, repair.weight_CC.T)
    if repair.norm_weight_CC is not None:
        wide_TC = x_TC.to(torch.promote_types(x_TC.dtype, torch.float32))
        scale_T1 = torch.rsqrt(wide_TC.square().mean(-1, keepdim=True) + repair.norm_eps)
        normed_TC = (wide_TC * scale_T1).to(x_TC.dtype)
        y_TC = y_TC + linear(normed_TC, repair.norm_weight_CC.T)
    return y_TC
