"""Carries windows through the layers of a model, for several variants of it at once.

All variants share the dense streams up to the first layer that differs; behind it each has its own.
Of a model whose layers are read one by one, all windows go through a layer before the next one is
read; of a model that is at hand as a whole, a batch goes through all layers before the next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ghost_dist.checkpoint.surgery import operator_as_computed, repair_stream
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.devices import free_bytes
from ghost_dist.engines.base import Tokens
from ghost_dist.engines.expert_parts import Inputs
from ghost_dist.engines.layerwise import Group, LayerwiseModel

_SHARE_FOR_STREAMS = 0.5
"""Of free memory; layers, logits and a batch's own memory have the rest."""

AtEnd = Callable[[slice, list[Tensor]], None]
"""Called with a slice of the windows, and the streams (B, T, C) of each variant that the final norm
would get, on the device; ``LayerwiseModel.logits`` may be called then."""


def sweep(
    model: LayerwiseModel,
    variants: Sequence[Variant],
    tokens: Tokens,
    *,
    batch: int,
    at_end: AtEnd,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Run every variant over all windows and hand the last streams over.

    Parameters
    ----------
    model
        With all layers of the uncut model.
    variants
        At least one.
    tokens
        int32, shape (windows, T).
    batch
        Windows per forward.
    at_end
        What to do with the streams; batch by batch.
    advance
        Called with the number of tokens just finished; those of a layer count as its share.

    Raises
    ------
    CheckpointError
        If weights that are read on the way are damaged.
    """
    groups: list[Group] = ["embeddings", *range(model.num_layers), "head"]
    chunk = batch if model.whole else len(tokens)
    for first in range(0, len(tokens), chunk):
        part = tokens[first : first + chunk]
        streams = _Streams(model, variants, part.shape, batch)
        told = 0
        with model.through(groups) as at_hand:
            for done, group in enumerate(at_hand):
                if group == "embeddings":
                    streams.embed(part)
                elif group == "head":
                    model.check_weights()
                    for rows in streams.parts():
                        windows = slice(first + rows.start, first + rows.stop)
                        at_end(windows, streams.of_all(rows))
                else:
                    streams.run_layer(group)
                now = part.size * done // (len(groups) - 1)
                advance(now - told)
                told = now


class _Streams:
    """The streams of all variants; those that are still the dense ones exist once."""

    def __init__(
        self,
        model: LayerwiseModel,
        variants: Sequence[Variant],
        shape: tuple[int, int],
        batch: int,
    ) -> None:
        self._model, self._variants, self._batch = model, variants, batch
        self._operators = [
            {
                span.stop: operator_as_computed(repair, model.dtype, model.device)
                for span, repair in variant.at_boundary.items()
            }
            for variant in variants
        ]
        self._shape = (*shape, model.hidden_size)
        self._place = model.device
        if not model.whole:
            stream_bytes = shape[0] * shape[1] * model.hidden_size * model.dtype.itemsize
            left = _SHARE_FOR_STREAMS * free_bytes(model.device) - model.bytes_at_once()
            if (len(variants) + 1) * stream_bytes > left:
                self._place = torch.device("cpu")
        self._dense = self._empty()
        self._own: list[Tensor | None] = [None] * len(variants)

    def parts(self) -> Iterator[slice]:
        """Slices of the windows that go through together."""
        for first in range(0, self._shape[0], self._batch):
            yield slice(first, min(first + self._batch, self._shape[0]))

    def embed(self, tokens: Tokens) -> None:
        """The streams entering layer 0."""
        for part in self.parts():
            ids_BT = torch.from_numpy(tokens[part].astype(np.int64)).to(self._model.device)
            self._dense[part] = self._model.embed(ids_BT).to(self._place)

    def run_layer(self, layer: int) -> None:
        """Let one layer act on every variant that has it, then the operators behind it."""
        self._part_ways(layer)
        running = [
            (variant, own)
            for variant, own in zip(self._variants, self._own, strict=True)
            if own is not None and layer not in variant.removed
        ]
        streams = [self._dense] if any(own is None for own in self._own) else []
        inputs = Inputs([*streams, *(own for _, own in running)], self._batch, self._model.device)
        with self._model.running(layer, inputs) as run:
            for streams_WTC in streams:
                self._run(run, streams_WTC)
            for variant, own in running:
                with self._model.with_down(layer, variant.downs.get(layer)):
                    self._run(run, own)
        self._repair(layer + 1)

    def of_all(self, part: slice) -> list[Tensor]:
        """The streams of every variant for some windows, on the model's device."""
        device = self._model.device
        dense = self._dense[part].to(device)
        return [dense if own is None else own[part].to(device) for own in self._own]

    def _part_ways(self, layer: int) -> None:
        """Variants that differ from this layer on get streams of their own."""
        for number, variant in enumerate(self._variants):
            if self._own[number] is None and variant.first_changed == layer:
                self._own[number] = self._empty().copy_(self._dense)

    def _run(self, run: Callable[[Tensor], Tensor], streams_WTC: Tensor) -> None:
        for part in self.parts():
            y_BTC = run(streams_WTC[part].to(self._model.device, non_blocking=True))
            streams_WTC[part] = y_BTC.to(self._place)

    def _repair(self, boundary: int) -> None:
        """Let operators act on the streams entering a boundary."""
        for own, operators in zip(self._own, self._operators, strict=True):
            if boundary not in operators:
                continue
            assert own is not None, "the span below has made this variant another"
            for part in self.parts():
                x_BTC = own[part].to(self._model.device)
                own[part] = repair_stream(operators[boundary], x_BTC).to(self._place)

    def _empty(self) -> Tensor:
        pinned = self._model.device.type == "cuda" and self._place.type == "cpu"
        return torch.empty(
            self._shape, dtype=self._model.dtype, device=self._place, pin_memory=pinned
        )
