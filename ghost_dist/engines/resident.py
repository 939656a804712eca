"""The whole truncated model on one device.

Only layers below the last boundary are built and loaded. Windows go through in batches, and every
boundary that the sink wants is pushed as it comes, so nothing is recomputed and no list of hidden
states is kept.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.load import Decoder
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.engines.sweep import Tap, sweep
from ghost_dist.statistics.span_sums import Collector

AUTO_BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens per forward when the batch is left to us: enough to fill the device's matrix units."""


class Engine(Protocol):
    """Runs the unpruned model up to its last boundary; no head, no cache, no gradient."""

    device: torch.device
    parameter_bytes: int = 0  # of a rank's share; 0 where nothing is shared
    conformance: float | None = None
    """Largest relative difference of the small random model by this engine and as a whole."""

    def run(
        self,
        tokens: Tokens,
        windows: Sequence[int],
        sink: Collector,
        advance: Callable[[int], None],
    ) -> None:
        """Push the sink's boundaries for rows of ``tokens``; tells ``advance`` tokens done."""


class ResidentEngine(Engine):
    """Runs a loaded decoder, which ranks may share, ``batch`` windows at a time."""

    read_bytes: int | None = None  # by this rank of what is shared; None: not known

    def __init__(self, decoder: Decoder, batch: int, *, compiled: bool = False) -> None:
        self.decoder, self._batch = decoder, batch
        self._layers = LayerwiseModel(decoder.model, decoder.architecture)
        if compiled:
            for layer in decoder.layers:
                layer.forward = torch.compile(layer.forward, dynamic=False)
        self.device = decoder.device

    def run(
        self,
        tokens: Tokens,
        windows: Sequence[int],
        sink: Collector,
        advance: Callable[[int], None],
    ) -> None:
        sweep(
            self._layers,
            [Variant()],
            tokens[list(windows)],
            [_Push(sink, windows)],
            batch=self._batch,
            stop=sink.boundaries[-1],
            advance=advance,
        )


class _Push(Tap):
    """Gives a sink what it wants as it comes."""

    def __init__(self, sink: Collector, windows: Sequence[int]) -> None:
        self._sink, self._windows = sink, windows
        self._boundaries, self.mlp_layers = frozenset(sink.boundaries), sink.mlp_layers

    def stream(self, boundary: int, part: slice, stream_BTC: Tensor) -> None:
        if boundary in self._boundaries:
            for window, stream_TC in zip(self._windows[part], stream_BTC, strict=True):
                self._sink(boundary, window, stream_TC)

    def mlp(self, layer: int, part: slice, input_BTF: Tensor, product_BTC: Tensor) -> None:
        for window, *rows in zip(self._windows[part], input_BTF, product_BTC, strict=True):
            self._sink.take_mlp(layer, window, *rows)


def auto_batch(device: torch.device, window_length: int, range_windows: int) -> int:
    """Windows per forward that fill the device: at least 1, and a divisor of those of a range."""
    # On a GPU the shape of a batch decides the last bits: engines that batch otherwise, and a run
    # that was stopped with some ranges done, agree where all batches have one shape.
    most = min(range_windows, AUTO_BATCH_TOKENS[device.type] // window_length)
    return next((size for size in range(most, 1, -1) if range_windows % size == 0), 1)
