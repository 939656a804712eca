"""Carries windows through the layers of a model, for several variants of it at once.

Variants share the dense streams, and those of one another, up to the first layer or operator in
which they differ. Of a model whose layers are read one by one, all windows go through a layer
before the next one is read; else a batch goes through all layers before the next batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.surgery import operator_as_computed, repair_stream
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.devices import empty_at, free_bytes, synchronize
from ghost_dist.engines.expert_parts import Inputs
from ghost_dist.engines.layerwise import Group, LayerwiseModel
from ghost_dist.spans import Sublayer

_GONE = ("gone",)  # what acts on the stream of a variant without the layer: nothing
_ENOUGH_TOKENS = {"cuda": 2048}  # for a layer to take longer than its start
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
    streams = _Streams(model, variants, tokens.shape, batch, taps, streams_WTC)
    for first in range(0, max(1, len(tokens)), chunk):
        part = tokens[first : first + chunk]
        streams.begin(first, part.shape)
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
    """Layers as often as a sweep runs them: once for all variants that are the same there yet."""
    layers = _Lineage.of(variants, num_layers).layers
    return [layer for layer, act in enumerate(layers) for _ in act.on]


class _Act(NamedTuple):
    """What becomes of streams at a layer, or at a boundary; they have numbers, the dense one 0."""

    copies: list[tuple[int, int]]  # new ones, and what each is a copy of at first
    on: list[tuple[int, int]]  # those that something acts on, and a variant of each


class _Lineage(NamedTuple):
    """Which streams there are where, so that variants that are equal up to there share one."""

    layers: list[_Act]
    boundaries: list[_Act]
    last: list[int]  # of every variant, its stream in the end

    @staticmethod
    def of(variants: Sequence[Variant], num_layers: int) -> _Lineage:
        stream_of, count = [0] * len(variants), 1

        def act(actions: Sequence[Hashable], nothing: Hashable) -> _Act:
            """Streams split by what acts on a variant: None is as in the dense model."""
            nonlocal count
            became: dict[tuple[int, Hashable], int] = {}
            found, kept = _Act([], []), set()
            for number, (of, action) in enumerate(zip(stream_of, actions, strict=True)):
                if (of, action) not in became:
                    # The dense stream goes on as such; of others the first goes on in its place.
                    stays = action is None if of == 0 else of not in kept
                    kept.add(of)
                    became[of, action] = of if stays else count
                    if not stays:
                        found.copies.append((count, of))
                        count += 1
                    if action != nothing:
                        found.on.append((became[of, action], number))
                stream_of[number] = became[of, action]
            return found

        behind = [{s.stop: id(one) for s, one in v.at_boundary.items()} for v in variants]
        layers, boundaries = [], [_Act([], [])]
        for layer in range(num_layers):
            layers.append(act([_act_of(variant, layer) for variant in variants], _GONE))
            boundaries.append(act([of.get(layer + 1) for of in behind], None))
        return _Lineage(layers, boundaries, stream_of)


def _act_of(variant: Variant, layer: int) -> Hashable:
    """What a layer does in a variant; None: as in the dense model."""
    if layer in variant.removed:
        return _GONE
    down_FC, halves = variant.downs.get(layer), _halves_gone(variant, layer)
    outputs = tuple((one, id(weight)) for one, weight in variant.outputs_of(layer).items())
    changed = halves or outputs or down_FC is not None
    return (halves, outputs, id(down_FC)) if changed else None


def _halves_gone(variant: Variant, layer: int) -> tuple[Sublayer, ...]:
    return tuple(one for one in variant.sublayers if one.layer == layer)


def _operators(model: LayerwiseModel, variants: Sequence[Variant]) -> list[dict[int, Repair]]:
    """Of every variant by boundary, as computed with; one that several have exists once."""
    repairs = {id(one): one for variant in variants for one in variant.at_boundary.values()}
    computed = {
        key: operator_as_computed(repair, model.dtype, model.device)
        for key, repair in repairs.items()
    }
    return [
        {span.stop: computed[id(repair)] for span, repair in variant.at_boundary.items()}
        for variant in variants
    ]


class _Streams:
    """The streams of all variants, each once for all that share it."""

    def __init__(
        self,
        model: LayerwiseModel,
        variants: Sequence[Variant],
        shape: tuple[int, ...],
        batch: int,
        taps: Sequence[Tap],
        dense_WTC: Tensor | None,
    ) -> None:
        self._model, self._variants, self._batch = model, variants, batch
        self._taps, self._device, self._dense_WTC = taps, model.device, dense_WTC
        self._lineage = _Lineage.of(variants, model.num_layers)
        self._operators = _operators(model, variants)
        self._place = model.device if dense_WTC is None else dense_WTC.device
        if dense_WTC is None and not model.whole:
            stream_bytes = shape[0] * shape[1] * model.hidden_size * model.dtype.itemsize
            left = _SHARE_FOR_STREAMS * free_bytes(model.device) - model.bytes_at_once()
            if (len(variants) + 1) * stream_bytes > left:
                self._place = torch.device("cpu")
        # So many go through a layer side by side, always as many: a GPU waits for its host where
        # a layer is given few tokens. What routes tokens to experts would let the streams of others
        # decide how it rounds.
        enough = 0 if model.routes else _ENOUGH_TOKENS.get(model.device.type, 0)
        self._together = max(1, min(batch, enough // max(1, shape[1])) // max(1, shape[0]))

    def begin(self, first: int, shape: tuple[int, int]) -> None:
        """Take windows (W, T) that go together, the first of which has that number."""
        self._first, self._shape = first, (*shape, self._model.hidden_size)
        self._streams = {0: self._empty() if self._dense_WTC is None else self._dense_WTC}

    def embed(self, tokens: Tokens) -> None:
        for part in self._parts():
            ids_BT = torch.from_numpy(tokens[part].astype(np.int64)).to(self._device)
            self._put(0, 0, part, self._model.embed(ids_BT))
        self._pass(0)

    def run_layer(self, layer: int) -> None:
        """Let one layer act on every variant that has it, then the operators behind it."""
        act = self._lineage.layers[layer]
        self._copy(act)
        taps = [tap for tap in self._taps if layer in tap.mlp_layers]
        by_halves: dict[tuple[Sublayer, ...], list[tuple[int, int]]] = {(): []}
        for stream, number in act.on:
            gone = _halves_gone(self._variants[number], layer)
            by_halves.setdefault(gone, []).append((stream, number))
        for gone, on in by_halves.items():
            alike = [stream for stream, number in on if self._of_model(layer, stream, number)]
            others = [pair for pair in on if pair[0] not in alike]
            in_order = [*(stream for stream, _ in others), *alike]
            streams = [self._streams[stream] for stream in in_order]
            inputs = Inputs(streams, self._batch, self._device)
            with (
                self._model.without(gone),
                self._model.running(layer, inputs, tapped=bool(taps or gone)) as run,
            ):
                for stream, number in others:
                    with (
                        self._mlp_tapped(layer, taps if stream == 0 else []),
                        self._model.as_in(self._variants[number], layer),
                    ):
                        self._change(stream, layer + 1, run)
                for first in range(0, len(alike), self._together):
                    self._change_together(alike[first : first + self._together], layer + 1, run)
        act = self._lineage.boundaries[layer + 1]
        self._copy(act)
        for stream, number in act.on:
            operator = self._operators[number][layer + 1]
            self._change(stream, layer + 1, partial(repair_stream, operator))
        self._pass(layer + 1)

    def end(self) -> None:
        for part in self._parts():
            batches = {stream: self._batch_of(stream, part) for stream in self._streams}
            streams = [batches[stream] for stream in self._lineage.last]
            for tap in self._taps:
                tap.last(self._rows(part), streams)

    def _parts(self) -> Iterator[slice]:
        for first in range(0, self._shape[0], self._batch):
            yield slice(first, min(first + self._batch, self._shape[0]))

    def _rows(self, part: slice) -> slice:
        return slice(self._first + part.start, self._first + part.stop)

    def _batch_of(self, stream: int, part: slice) -> Tensor:
        return self._streams[stream][part].to(self._device, non_blocking=True)

    def _put(self, stream: int, boundary: int, part: slice, y_BTC: Tensor) -> None:
        """A batch of a stream; of the dense one taps see it first."""
        if stream == 0:
            for tap in self._taps:
                tap.stream(boundary, self._rows(part), y_BTC)
        if self._model.whole:  # the batch is all there is
            self._streams[stream] = y_BTC
        else:
            self._streams[stream][part].copy_(y_BTC, non_blocking=True)

    def _pass(self, boundary: int) -> None:
        for tap in self._taps:
            tap.passed(boundary, self._streams[0])

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

        with self._model.down_projection(layer).register_forward_hook(hook):
            yield

    def _copy(self, act: _Act) -> None:
        """Begin the new streams of a layer or a boundary."""
        if act.copies and self._place != self._device:
            synchronize(self._device)  # the host reads what the device writes
        for stream, of in act.copies:
            old = self._streams[of]
            self._streams[stream] = old if self._model.whole else self._empty().copy_(old)

    def _change(self, stream: int, boundary: int, run: Callable[[Tensor], Tensor]) -> None:
        for part in self._parts():
            self._put(stream, boundary, part, run(self._batch_of(stream, part)))

    def _of_model(self, layer: int, stream: int, number: int) -> bool:
        """Whether a stream, not the dense one, goes through a layer with the model's weights."""
        variant = self._variants[number]
        return stream != 0 and not (layer in variant.downs or variant.outputs_of(layer))

    def _change_together(
        self, streams: Sequence[int], boundary: int, run: Callable[[Tensor], Tensor]
    ) -> None:
        if self._together == 1:
            self._change(streams[0], boundary, run)
            return
        every = slice(0, self._shape[0])
        given = [self._batch_of(stream, every) for stream in streams]
        # Of the same shape whatever others there are, so that each is rounded in the same way.
        given += given[-1:] * (self._together - len(streams))
        made = torch.split(run(torch.cat(given)), self._shape[0])
        for stream, y_BTC in zip(streams, made, strict=False):
            self._put(stream, boundary, every, y_BTC)

    def _empty(self) -> Tensor:
        return empty_at(self._place, self._shape, self._model.dtype, self._device)
