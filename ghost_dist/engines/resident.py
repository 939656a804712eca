"""The whole truncated model on one device.

Only layers below the last boundary are built and loaded. Windows go through in batches; every
boundary that the sink wants is taken from the layer's own input, so nothing is recomputed and no
list of hidden states is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ghost_dist.checkpoint.load import Decoder
from ghost_dist.engines.base import Sink, Tokens

AUTO_BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens per forward when the batch is left to us: enough to fill the device's matrix units."""


class _LastBoundary(Exception):  # noqa: N818 - no error: it ends a forward early
    """The last boundary that the sink wants has been pushed."""


class ResidentEngine:
    """Runs a loaded decoder window batch by window batch.

    Parameters
    ----------
    decoder
        Layers 0 to the last boundary - 1, on one device.
    batch
        Windows per forward.
    compiled
        Let ``torch.compile`` fuse what a layer does between its matrix products.
    """

    def __init__(self, decoder: Decoder, batch: int, *, compiled: bool = False) -> None:
        self._decoder = decoder
        if compiled:
            for layer in decoder.layers:
                layer.forward = torch.compile(layer.forward, dynamic=False)
        self._batch = batch
        self.hidden_size = decoder.hidden_size
        self.num_layers = decoder.num_layers
        self.device = decoder.device

    def run(
        self,
        tokens: Tokens,
        windows: Sequence[int],
        sink: Sink,
        advance: Callable[[int], None],
    ) -> None:
        """Push the sink's boundaries for the given windows; see ``engines.base.Engine``."""
        last = sink.boundaries[-1]
        assert last <= self._decoder.num_layers, "a boundary lies above the layers that were loaded"
        current: list[int] = []

        def push(boundary: int, stream_BTC: Tensor) -> None:
            for window, stream_TC in zip(current, stream_BTC, strict=True):
                sink(boundary, window, stream_TC)

        def push_mlp(layer: int, input_BTF: Tensor, product_BTC: Tensor) -> None:
            shape = (len(current), -1)  # some families flatten batch and tokens around their MLP
            inputs = input_BTF.reshape(*shape, input_BTF.shape[-1])
            products = product_BTC.reshape(*shape, product_BTC.shape[-1])
            for window, input_TF, product_TC in zip(current, inputs, products, strict=True):
                sink.take_mlp(layer, window, input_TF, product_TC)

        with (
            torch.inference_mode(),
            self._tapped(sink.boundaries, push),
            self._mlp_tapped(sink.mlp_layers, push_mlp),
            self._stopped(last),
        ):
            for first in range(0, len(windows), self._batch):
                current[:] = windows[first : first + self._batch]
                batch_BT = torch.from_numpy(tokens[current]).to(self.device, torch.int64)
                with contextlib.suppress(_LastBoundary):  # which its own tap has pushed
                    push(last, self._decoder(batch_BT))
                advance(batch_BT.numel())

    @contextlib.contextmanager
    def _stopped(self, last: int) -> Iterator[None]:
        """Layers after the last boundary are not run, where the engine has any."""
        if last == self._decoder.num_layers:
            yield
            return

        def stop(*_: Any) -> None:
            raise _LastBoundary

        handle = self._decoder.layers[last].register_forward_pre_hook(stop)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _tapped(
        self, boundaries: Sequence[int], push: Callable[[int, Tensor], None]
    ) -> Iterator[None]:
        def tap(boundary: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                push(boundary, args[0] if args else kwargs["hidden_states"])

            return hook

        handles = [
            self._decoder.layers[boundary].register_forward_pre_hook(
                tap(boundary), with_kwargs=True
            )
            for boundary in boundaries
            if boundary < self._decoder.num_layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _mlp_tapped(
        self, layers: Sequence[int], push: Callable[[int, Tensor, Tensor], None]
    ) -> Iterator[None]:
        def tap(layer: int) -> Callable[[Any, tuple[Any, ...], Tensor], None]:
            def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
                push(layer, *self._mlp_streams(layer, module, args[0], output))

            return hook

        handles = [
            self._decoder.down_projection(layer).register_forward_hook(tap(layer))
            for layer in layers
        ]
        # A compiled forward may leave out hooks that came later.
        compiled = {
            layer: self._decoder.layers[layer].__dict__.pop("forward")
            for layer in layers
            if "forward" in self._decoder.layers[layer].__dict__
        }
        try:
            yield
        finally:
            for layer, forward in compiled.items():
                self._decoder.layers[layer].__dict__["forward"] = forward
            for handle in handles:
                handle.remove()

    def _mlp_streams(
        self,
        layer: int,  # noqa: ARG002 - an engine whose ranks share a layer needs to know which
        module: Any,
        input_BTF: Tensor,
        output_BTC: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What a sink gets of a down_proj: its input, and its output without the bias."""
        return input_BTF, output_BTC if module.bias is None else output_BTC - module.bias


def auto_batch(device: torch.device, window_length: int, range_windows: int) -> int:
    """Windows per forward that fill the device: at least 1, and a divisor of those of a range.

    On a GPU the shape of a batch decides the last bits. An engine that runs range by range and one
    that runs all windows a layer at a time agree where all batches have one shape; so does a run
    that was stopped with some of its ranges done.
    """
    most = min(range_windows, AUTO_BATCH_TOKENS[device.type] // window_length)
    return next((size for size in range(most, 1, -1) if range_windows % size == 0), 1)
