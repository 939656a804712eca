"""What a model becomes: which layers and halves go, what is put at gaps, which matrices change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.spans import Span, Sublayer


@dataclass(frozen=True, eq=False)
class Variant:
    """The dense model (by default), a pruned or a recovered one.

    It is scored by sweeps (``engines/sweep.py``), applied to a model in memory
    (``checkpoint/surgery.py``) and written by ``export/rewrite.py``.
    """

    spans: tuple[Span, ...] = ()  # removed; sorted and joined, as ``check_spans`` gives them
    operators: Mapping[Span, Repair] = field(default_factory=dict)  # none: the span is cut only
    sublayers: tuple[Sublayer, ...] = ()  # removed of layers that stay; sorted
    outputs: Mapping[Sublayer, Tensor] = field(default_factory=dict)  # new weights (in, C)

    @property
    def removed(self) -> frozenset[int]:
        return frozenset(layer for span in self.spans for layer in range(span.start, span.stop))

    def outputs_of(self, layer: int) -> dict[Sublayer, Tensor]:
        """What ends the halves of a layer now; of MLPs see ``downs`` too."""
        return {one: weight_FC for one, weight_FC in self.outputs.items() if one.layer == layer}

    @property
    def cut(self) -> Variant:
        """What goes, and nothing in its place."""
        return Variant(self.spans, sublayers=self.sublayers)

    @property
    def has_code(self) -> bool:
        """Whether an export needs a modeling file: transformers' own cannot compute it."""
        return bool(self.at_boundary or self.sublayers)

    @property
    def downs(self) -> dict[int, Tensor]:
        """New down_proj weights (F, C) by layer of the uncut model."""
        return {
            span.start - 1: repair.down_FC
            for span, repair in self.operators.items()
            if repair.down_FC is not None
        }

    @property
    def at_boundary(self) -> dict[Span, Repair]:
        """Operators that do something at their boundary."""
        return {span: one for span, one in self.operators.items() if one.boundary_parts()}

    @property
    def keeps_float32(self) -> bool:
        """Whether operators stay in float32 in a model of another dtype: if one is given so."""
        return any(repair.dtype == torch.float32 for repair in self.operators.values())

    @property
    def first_changed(self) -> int | None:
        """The first layer whose input is the dense model's but whose output is not."""
        halves = (one.layer for one in (*self.sublayers, *self.outputs))
        return min([*(span.start for span in self.spans), *self.downs, *halves], default=None)

    def stored(self, dtype: torch.dtype, operator_dtype: torch.dtype) -> Variant:
        """As a checkpoint holds it: down_proj weights in its dtype, operators in theirs."""
        return Variant(
            self.spans,
            {span: one.stored(operator_dtype, dtype) for span, one in self.operators.items()},
            self.sublayers,
            {one: weight_FC.to(dtype) for one, weight_FC in self.outputs.items()},
        )
