"""Carries windows through the layers of a model, for several variants of it at once.

All variants share the dense streams up to the first layer that differs; behind it each has its own.
Of a model whose layers are read one by one, all windows go through a layer before the next one is
read; of a model that is at hand as a whole, a batch goes through all layers before the next batch.
What is wanted of the streams on the way is taken by taps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.surgery import operator_as_computed, repair_stream
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.devices import free_bytes, synchronize
from ghost_dist.engines.expert_parts import Inputs, RunLayer
from ghost_dist.engines.layerwise import Group, LayerwiseModel
from ghost_dist.spans import Sublayer

_SHARE_FOR_STREAMS = 0.5  # of free memory; layers, logits and a batch's own memory have the rest


class Tap:
    """Takes streams on the way, of ``part`` of the windows; of ``mlp_layers`` the down_proj too."""

    mlp_layers: Collection[int] = ()

    def stream(self, boundary: int, part: slice, stream_BTC: Tensor) -> None:
        """A batch of the dense stream entering a layer; it is not written to afterwards."""

    def mlp(self, layer: int, part: slice, input_BTF: Tensor, product_BTC: Tensor) -> None:
        """The input H of a layer's down_proj in the dense model and ``H @ down``, without bias."""

    def passed(self, boundary: int, streams_WTC: Tensor) -> None:
        """The dense streams of all windows that go together; the next layer overwrites them."""

    def last(self, part: slice, streams: list[Tensor]) -> None:
        """What the final norm would get of each variant, (B, T, C); logits may be asked for."""


class AtEnd(Tap):
    """Gives the last streams to a function, called as :meth:`Tap.last`."""

    def __init__(self, take: Callable[[slice, list[Tensor]], None]) -> None:
        self._take = take

    def last(self, part: slice, streams: list[Tensor]) -> None:
        self._take(part, streams)


def sweep(
    model: LayerwiseModel,
    variants: Sequence[Variant],
    tokens: Tokens,
    taps: Sequence[Tap],
    *,
    batch: int,
    stop: int | None = None,
    streams_WTC: Tensor | None = None,
    done: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Run every variant over all windows (int32, (W, T)), ``batch`` of them per forward.

    ``stop`` is the last boundary; None: behind all layers, with the head at hand there. The dense
    streams are kept in ``streams_WTC`` (None: on the device, if there is room for all), which is at
    the boundary ``done`` already (None: empty). ``advance`` is told the tokens just finished; those
    of a layer count as its share.
    """
    last = model.num_layers if stop is None else stop
    head: list[Group] = ["head"] if stop is None else []
    groups: list[Group] = ["embeddings", *range(done or 0, last), *head]
    chunk = batch if model.whole else max(1, len(tokens))
    for first in range(0, max(1, len(tokens)), chunk):
        part = tokens[first : first + chunk]
        streams = _Streams(model, variants, part.shape, batch, first, taps, streams_WTC)
        told = 0
        with model.through(groups) as at_hand:
            for group in at_hand:
                boundary = 0
                if group == "embeddings" and done is None:
                    streams.embed(part)
                elif group == "head":
                    model.check_weights()  # before logits of them are looked at
                    streams.end()
                    boundary = last + 1
                elif isinstance(group, int):
                    streams.run_layer(group)
                    boundary = group + 1
                now = part.size * boundary // (last + len(head))
                advance(now - told)
                told = now
            model.check_weights()


def layers_run(variants: Sequence[Variant], num_layers: int) -> list[int]:
    """Layers as often as a sweep runs them: once for all variants that are the dense model yet."""
    firsts = [
        num_layers if variant.first_changed is None else variant.first_changed
        for variant in variants
    ]
    own = [
        layer
        for variant, first in zip(variants, firsts, strict=True)
        for layer in range(first, num_layers)
        if layer not in variant.removed
    ]
    return [*range(max(firsts, default=0)), *own]


class _Streams:
    """The streams of all variants; those that are still the dense ones exist once."""

    def __init__(
        self,
        model: LayerwiseModel,
        variants: Sequence[Variant],
        shape: tuple[int, int],
        batch: int,
        first: int,
        taps: Sequence[Tap],
        dense_WTC: Tensor | None,
    ) -> None:
        self._model, self._variants, self._batch = model, variants, batch
        self._first, self._taps, self._device = first, taps, model.device
        self._operators = [
            {
                span.stop: operator_as_computed(repair, model.dtype, model.device)
                for span, repair in variant.at_boundary.items()
            }
            for variant in variants
        ]
        self._shape = (*shape, model.hidden_size)
        self._place = model.device if dense_WTC is None else dense_WTC.device
        if dense_WTC is None and not model.whole:
            stream_bytes = shape[0] * shape[1] * model.hidden_size * model.dtype.itemsize
            left = _SHARE_FOR_STREAMS * free_bytes(model.device) - model.bytes_at_once()
            if (len(variants) + 1) * stream_bytes > left:
                self._place = torch.device("cpu")
        self._dense = self._empty() if dense_WTC is None else dense_WTC
        self._own: list[Tensor | None] = [None] * len(variants)

    def embed(self, tokens: Tokens) -> None:
        for part in self._parts():
            ids_BT = torch.from_numpy(tokens[part].astype(np.int64)).to(self._device)
            self._take(0, part, self._model.embed(ids_BT))
        self._pass(0)

    def run_layer(self, layer: int) -> None:
        """Let one layer act on every variant that has it, then the operators behind it."""
        for number, variant in enumerate(self._variants):
            if self._own[number] is None and variant.first_changed == layer:
                self._own[number] = self._dense if self._model.whole else self._copy()
        running = [
            number
            for number, own in enumerate(self._own)
            if own is not None and layer not in self._variants[number].removed
        ]
        by_halves: dict[tuple[Sublayer, ...], list[int]] = {(): []}
        for number in running:
            gone = tuple(one for one in self._variants[number].sublayers if one.layer == layer)
            by_halves.setdefault(gone, []).append(number)
        streams = [self._dense] if any(own is None for own in self._own) else []
        taps = [tap for tap in self._taps if layer in tap.mlp_layers]
        for gone, numbers in by_halves.items():
            inputs = self._inputs([*([] if gone else streams), *(self._own[n] for n in numbers)])
            with (
                self._model.without(gone),
                self._model.running(layer, inputs, tapped=bool(taps or gone)) as run,
            ):
                if streams and not gone:
                    with self._mlp_tapped(layer, taps):
                        for part in self._parts():
                            self._take(layer + 1, part, run(self._batch_of(self._dense, part)))
                for number in numbers:
                    self._run_own(layer, number, run)
        self._repair(layer + 1)
        self._pass(layer + 1)

    def _run_own(self, layer: int, number: int, run: RunLayer) -> None:
        own = self._own[number]
        assert own is not None, "it differs from the dense model by now"
        with self._model.with_down(layer, self._variants[number].downs.get(layer)):
            for part in self._parts():
                own = self._put(own, part, run(self._batch_of(own, part)))
        self._own[number] = own

    def _inputs(self, streams: Sequence[Tensor | None]) -> Inputs:
        return Inputs([s for s in streams if s is not None], self._batch, self._device)

    def end(self) -> None:
        for part in self._parts():
            dense = self._batch_of(self._dense, part)
            streams = [dense if own is None else self._batch_of(own, part) for own in self._own]
            for tap in self._taps:
                tap.last(self._rows(part), streams)

    def _parts(self) -> Iterator[slice]:
        for first in range(0, self._shape[0], self._batch):
            yield slice(first, min(first + self._batch, self._shape[0]))

    def _rows(self, part: slice) -> slice:
        return slice(self._first + part.start, self._first + part.stop)

    def _batch_of(self, streams_WTC: Tensor, part: slice) -> Tensor:
        return streams_WTC[part].to(self._device, non_blocking=True)

    def _put(self, streams_WTC: Tensor, part: slice, y_BTC: Tensor) -> Tensor:
        if self._model.whole:  # the batch is all there is
            return y_BTC
        streams_WTC[part].copy_(y_BTC, non_blocking=True)
        return streams_WTC

    def _take(self, boundary: int, part: slice, stream_BTC: Tensor) -> None:
        """A batch of the dense stream, which taps see first."""
        for tap in self._taps:
            tap.stream(boundary, self._rows(part), stream_BTC)
        self._dense = self._put(self._dense, part, stream_BTC)

    def _pass(self, boundary: int) -> None:
        for tap in self._taps:
            tap.passed(boundary, self._dense)

    @contextlib.contextmanager
    def _mlp_tapped(self, layer: int, taps: Sequence[Tap]) -> Iterator[None]:
        if not taps:
            yield
            return
        parts = self._parts()

        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            part = next(parts)
            shape = (part.stop - part.start, self._shape[1], -1)  # some families flatten them
            given, product = self._model.mlp_streams(layer, module, args[0], output)
            for tap in taps:
                tap.mlp(layer, self._rows(part), given.reshape(shape), product.reshape(shape))

        handle = self._model.down_projection(layer).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _copy(self) -> Tensor:
        if self._place != self._device:
            synchronize(self._device)  # the host reads what the device writes
        return self._empty().copy_(self._dense)

    def _repair(self, boundary: int) -> None:
        for number, operators in enumerate(self._operators):
            own = self._own[number]
            if boundary not in operators:
                continue
            assert own is not None, "the span below has made this variant another"
            for part in self._parts():
                y_BTC = repair_stream(operators[boundary], self._batch_of(own, part))
                own = self._put(own, part, y_BTC)
            self._own[number] = own

    def _empty(self) -> Tensor:
        pinned = self._device.type == "cuda" and self._place.type == "cpu"
        return torch.empty(
            self._shape, dtype=self._model.dtype, device=self._place, pin_memory=pinned
        )
