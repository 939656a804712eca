"""What every engine does: push boundary streams of token windows into a sink.

An engine owns the model and the order of computation; a sink (``statistics/span_sums.py``) owns the
sums. Boundary ``b`` is the residual stream entering layer ``b``; the last one is the stream that
the final norm would receive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Tokens = np.ndarray[Any, np.dtype[np.int32]]


class Sink(Protocol):
    """Takes streams; within a window boundaries ascend, across windows any interleaving comes."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Boundaries that must be pushed, ascending."""

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        """Layers whose down_proj must be pushed, ascending; between their boundary and the next."""

    def __call__(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        """Take one window's stream (T, C), on the engine's device; a sink may keep it."""

    def take_mlp(self, layer: int, window: int, input_TF: Tensor, product_TC: Tensor) -> None:
        """Take the input H (T, F) of a layer's down_proj and ``H @ down`` (T, C), without bias."""


class Engine(Protocol):
    """Runs the unpruned model up to its last boundary; no head, no cache, no gradient."""

    hidden_size: int
    device: torch.device

    def run(
        self, tokens: Tokens, windows: Sequence[int], sink: Sink, advance: Callable[[int], None]
    ) -> None:
        """Push the sink's boundaries for rows of ``tokens``; tells ``advance`` tokens done."""
