"""Several variants of one model in a single pass over its layers: each layer is read once.

A *lane* is the dense model, or the model without some spans, with operators and new down_proj
weights in place. All lanes share the streams up to the first layer that differs; behind it each has
its own. So comparing dense, pruned, recovered, and a dozen candidates, reads the checkpoint once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.repair import Repair, down_projections
from ghost_dist.checkpoint.surgery import operator_as_computed, repair_stream
from ghost_dist.devices import free_bytes
from ghost_dist.engines.base import Tokens
from ghost_dist.engines.expert_parts import Inputs
from ghost_dist.engines.streamed_model import Group, StreamedModel
from ghost_dist.spans import Span

_SHARE_FOR_STREAMS = 0.5
"""Of free memory; layers, logits and a batch's own memory have the rest."""


@dataclass(frozen=True)
class Lane:
    """One variant of the model.

    Attributes
    ----------
    spans
        What is removed; empty for the dense model.
    operators
        Repairs by span.
    healed
        More down_proj weights (F, C), by layer of the uncut model.
    """

    spans: tuple[Span, ...] = ()
    operators: Mapping[Span, Repair] = field(default_factory=dict)
    healed: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def removed(self) -> frozenset[int]:
        """Layers that do not run."""
        return frozenset(layer for span in self.spans for layer in range(span.start, span.stop))

    @property
    def downs(self) -> Mapping[int, Tensor]:
        """New down_proj weights by layer."""
        return down_projections(self.operators, self.healed)

    @property
    def first_changed(self) -> int | None:
        """The first layer whose input is the dense model's but whose output is not."""
        changed = [*(span.start for span in self.spans), *self.downs]
        return min(changed) if changed else None


AtEnd = Callable[[slice, list[Tensor]], None]
"""Called with a slice of the windows, and the streams (B, T, C) of each lane that the final norm
would get, on the device; ``StreamedModel.logits`` may be called then."""


def run_lanes(
    model: StreamedModel,
    architecture: Architecture,
    lanes: Sequence[Lane],
    tokens: Tokens,
    *,
    batch: int,
    at_end: AtEnd,
    advance: Callable[[int], None],
) -> None:
    """Run every lane over all windows, layer by layer, and hand the last streams over.

    Parameters
    ----------
    model
        With all layers of the uncut model.
    architecture
        Of the uncut model.
    lanes
        At least one.
    tokens
        int32, shape (windows, T).
    batch
        Windows per forward.
    at_end
        What to do with the streams; batch by batch.
    advance
        Called with the number of layers just finished, the embeddings left out and the head
        counted as one.

    Raises
    ------
    CheckpointError
        As for :class:`StreamedModel`.
    """
    streams = _Streams(model, lanes, tokens, batch)
    num_layers = model.num_layers
    groups: list[Group] = ["embeddings", *range(num_layers), "head"]
    with model.through(groups) as at_hand:
        for group in at_hand:
            if group == "embeddings":
                streams.embed(tokens)
            elif group == "head":
                model.check_weights()
                for part in streams.parts():
                    at_end(part, streams.of_all(part))
                advance(1)
            else:
                assert isinstance(group, int)
                streams.run_layer(group, architecture)
                advance(1)


class _Streams:
    """The streams of all lanes; those that are still the dense ones exist once."""

    def __init__(
        self, model: StreamedModel, lanes: Sequence[Lane], tokens: Tokens, batch: int
    ) -> None:
        self._model, self._lanes, self._batch = model, lanes, batch
        self._operators = [
            {
                span.stop: operator_as_computed(repair, model.dtype, model.device)
                for span, repair in lane.operators.items()
                if repair.boundary_parts()
            }
            for lane in lanes
        ]
        shape = (*tokens.shape, model.hidden_size)
        nbytes = (len(lanes) + 1) * tokens.size * model.hidden_size * model.dtype.itemsize
        left = _SHARE_FOR_STREAMS * free_bytes(model.device) - model.bytes_at_once()
        fits = nbytes <= left
        self._place = model.device if fits else torch.device("cpu")
        self._shape = shape
        self._dense = self._empty()
        self._own: list[Tensor | None] = [None] * len(lanes)

    def parts(self) -> Iterator[slice]:
        """Slices of the windows that go through together."""
        for first in range(0, self._shape[0], self._batch):
            yield slice(first, min(first + self._batch, self._shape[0]))

    def embed(self, tokens: Tokens) -> None:
        """The streams entering layer 0."""
        for part in self.parts():
            ids_BT = torch.from_numpy(tokens[part].astype(np.int64)).to(self._model.device)
            self._dense[part] = self._model.embed(ids_BT).to(self._place)
        self._repair(0)

    def run_layer(self, layer: int, architecture: Architecture) -> None:
        """Let one layer act on every lane that has it, then the operators behind it."""
        self._part_ways(layer)
        running = [
            (lane, own)
            for lane, own in zip(self._lanes, self._own, strict=True)
            if own is not None and layer not in lane.removed
        ]
        streams = [self._dense] if any(own is None for own in self._own) else []
        inputs = Inputs([*streams, *(own for _, own in running)], self._batch, self._model.device)
        with self._model.running(layer, inputs) as run:
            for streams_WTC in streams:
                self._run(run, streams_WTC)
            for lane, own in running:
                with self._down_of(lane, layer, architecture):
                    self._run(run, own)
        self._repair(layer + 1)

    def of_all(self, part: slice) -> list[Tensor]:
        """The streams of every lane for some windows, on the model's device."""
        device = self._model.device
        dense = self._dense[part].to(device)
        return [dense if own is None else own[part].to(device) for own in self._own]

    def _part_ways(self, layer: int) -> None:
        """Lanes that differ from this layer on get streams of their own."""
        for number, lane in enumerate(self._lanes):
            if self._own[number] is None and lane.first_changed == layer:
                self._own[number] = self._empty().copy_(self._dense)

    def _run(self, run: Callable[[Tensor], Tensor], streams_WTC: Tensor) -> None:
        for part in self.parts():
            y_BTC = run(streams_WTC[part].to(self._model.device, non_blocking=True))
            streams_WTC[part] = y_BTC.to(self._place)

    def _repair(self, boundary: int) -> None:
        """Let operators act on the streams entering a boundary."""
        for number, operators in enumerate(self._operators):
            own = self._own[number]
            if boundary not in operators:
                continue
            assert own is not None, "the span below has made this lane another"
            for part in self.parts():
                x_BTC = own[part].to(self._model.device)
                own[part] = repair_stream(operators[boundary], x_BTC).to(self._place)

    @contextlib.contextmanager
    def _down_of(self, lane: Lane, layer: int, architecture: Architecture) -> Iterator[None]:
        """The lane's own down_proj in a layer, if it has one."""
        down_FC = lane.downs.get(layer)
        if down_FC is None:
            yield
            return
        path = architecture.down_projections[layer]
        module = self._model.layers[layer].get_submodule(path)
        own = module.weight
        weight_CF = down_FC.T.to(own.device, own.dtype).contiguous()
        module.weight = nn.Parameter(weight_CF, requires_grad=False)
        try:
            yield
        finally:
            module.weight = own

    def _empty(self) -> Tensor:
        pinned = self._model.device.type == "cuda" and self._place.type == "cpu"
        return torch.empty(
            self._shape, dtype=self._model.dtype, device=self._place, pin_memory=pinned
        )
