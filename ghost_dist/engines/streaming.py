"""Layer after layer: each is read once, runs all windows, and gives its memory to the next.

    embeddings -> streams of all windows -> layer 0 -> layer 1 -> ... -> last boundary
                                              kept rows: boundaries and MLP inputs that sinks want

For checkpoints that are larger than the device, or than the machine. What stays is the streams of
all windows at one boundary, and the *rows*: streams of those boundaries that sinks want. Sinks are
fed at the end, range by range, so only one range's sums exist at a time; rows are far smaller than
sums (T C against C^2 numbers of four times the size).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghost_dist.checkpoint.architecture import Architecture, inspect_architecture
from ghost_dist.checkpoint.reader import Checkpoint, open_checkpoint
from ghost_dist.devices import SHARE_OF_FREE_MEMORY, free_bytes, mark, synchronize
from ghost_dist.engines.base import Sink, Tokens
from ghost_dist.engines.conformance import check_streamed
from ghost_dist.engines.expert_parts import Inputs
from ghost_dist.engines.layerwise import Group
from ghost_dist.engines.peers import ALONE, Peers
from ghost_dist.engines.streamed_model import StreamedModel
from ghost_dist.statistics.span_sums import FiniteCheck
from ghost_dist.statistics.stream_state import StreamState

_WIDTHS_AT_ONCE = 16
"""Streams' worth of memory that a batch takes inside a layer (attention, MLP)."""


@dataclass
class Rows:
    """Streams of all windows of a sweep at the places that sinks want.

    Attributes
    ----------
    windows
        Window ids, in the order of the first dimension.
    tensors
        By name: ``"boundary b"`` (W, T, C), ``"mlp input l"`` (W, T, F), ``"mlp product l"``
        (W, T, C); of ranks that share the windows, those of this rank's part.
    peers
        Who has the rest.
    """

    windows: tuple[int, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    peers: Peers = ALONE

    def feed(self, windows: Sequence[int], sink: Sink, device: torch.device) -> None:
        """Give a sink what it wants of some windows, in their order; collective over the peers."""
        own = self.peers.part_of(len(self.windows))
        position = {window: number for number, window in enumerate(self.windows)}
        order = sorted([(b, 0) for b in sink.boundaries] + [(la, 1) for la in sink.mlp_layers])

        def row(name: str, window: int) -> Tensor:
            rows_WTn, number = self.tensors[name], position[window]
            if number in own:
                row_Tn = rows_WTn[number - own.start].to(device, non_blocking=True)
            else:
                row_Tn = torch.empty(rows_WTn.shape[1:], dtype=rows_WTn.dtype, device=device)
            self.peers.send(row_Tn, self.peers.owner_of(number, len(self.windows)))
            return row_Tn

        for window in windows:
            for index, is_mlp in order:
                if is_mlp:
                    given, product = (row(f"mlp {n} {index}", window) for n in ("input", "product"))
                    sink.take_mlp(index, window, given, product)
                else:
                    sink(index, window, row(f"boundary {index}", window))


class StreamingEngine:
    """Runs a model that fits nowhere as a whole; an ``Engine`` like the others.

    A family must have been proven by :func:`prove_streamed` in this process.

    Parameters
    ----------
    checkpoint, architecture
        Of the uncut model.
    num_layers
        The last boundary that will be asked for.
    dtype, device
        Of the computation.
    batch
        Windows per forward.
    keep_cached
        Leave the files in the page cache.
    compiled
        As for :class:`~ghost_dist.engines.streamed_model.StreamedModel`.
    peers
        Ranks that make the same calls at the same time: they share the windows and the reading.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        *,
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        keep_cached: bool = False,
        compiled: bool = False,
        peers: Peers = ALONE,
    ) -> None:
        self._architecture, self._batch, self._peers = architecture, batch, peers
        self.model = StreamedModel(
            checkpoint,
            architecture,
            num_layers=num_layers,
            dtype=dtype,
            device=device,
            keep_cached=keep_cached,
            compiled=compiled,
            shared=peers if peers.count > 1 else None,
        )
        self.hidden_size, self.device = architecture.hidden_size, device

    def close(self) -> None:
        """End reading."""
        self.model.close()

    def run(
        self,
        tokens: Tokens,
        windows: Sequence[int],
        sink: Sink,
        advance: Callable[[int], None],
    ) -> None:
        """Push the sink's boundaries for the given windows; see ``engines.base.Engine``.

        The sink is fed after the last layer, and ``advance`` is called with tokens then.
        """
        rows = self.sweep(tokens, windows, sink.boundaries, sink.mlp_layers, lambda _: None)
        rows.feed(windows, sink, self.device)
        advance(len(windows) * tokens.shape[1])

    def sweep(
        self,
        tokens: Tokens,
        windows: Sequence[int],
        boundaries: Sequence[int],
        mlp_layers: Sequence[int],
        advance: Callable[[int], None],
        state: StreamState | None = None,
    ) -> Rows:
        """Run layers up to the last boundary over all windows; every layer is read once.

        Parameters
        ----------
        tokens
            int32, shape (num_windows, T).
        windows
            Row numbers to run; of all peers.
        boundaries, mlp_layers
            What to keep, ascending.
        advance
            Called with the number of layers just finished.
        state
            Where streams are saved, and from where an interrupted sweep goes on; without peers.

        Raises
        ------
        NonFiniteActivationError
            If a stream holds NaN or Inf.
        CheckpointError
            If a file is gone, changed, damaged, or lacks a tensor.
        OSError
            If the state cannot be written.
        """
        assert state is None or state.windows == tuple(windows), "saved streams have an order"
        assert state is None or self._peers.count == 1, "peers save no streams"
        last = boundaries[-1]
        rows = Rows(tuple(windows), peers=self._peers)
        part = self._peers.part_of(len(windows))
        windows = windows[part.start : part.stop]
        place = _Place.for_sweep(self, len(windows), tokens.shape[1], boundaries, mlp_layers)
        saved = None if state is None else state.load()
        if saved is not None:
            streams_WTC = place.streams(saved.streams_WTC)
            rows.tensors = {name: place.row(tensor) for name, tensor in saved.rows.items()}
            advance(saved.boundary)
        else:
            shape = (len(windows), tokens.shape[1], self.hidden_size)
            streams_WTC = torch.empty(
                shape,
                dtype=self.model.dtype,
                device=place.of_streams,
                pin_memory=place.pinned(place.of_streams),
            )
        done = -1 if saved is None else saved.boundary

        checks = _Checks(self.model, self.device, place)

        def finish(boundary: int, finite: FiniteCheck) -> None:
            checks.later(finite)
            name = f"boundary {boundary}"
            if boundary in boundaries:
                rows.tensors[name] = place.row_of(streams_WTC)
                if state is not None:
                    state.keep(name, rows.tensors[name], mark(self.device))
            if state is not None and boundary > 0:
                state.save(boundary, name if boundary in boundaries else streams_WTC.clone)

        groups: list[Group] = ["embeddings", *range(max(done, 0), last)]
        with self.model.through(groups) as at_hand:
            for group in at_hand:
                if group == "embeddings":
                    if done < 0:
                        finish(0, self._embed(tokens, windows, streams_WTC))
                    continue
                assert isinstance(group, int)
                kept, finite = self._run_layer(
                    group, windows, streams_WTC, group in mlp_layers, place
                )
                for name, tensor in kept.items():
                    rows.tensors[name] = tensor
                    if state is not None:
                        state.keep(name, tensor, mark(self.device))
                finish(group + 1, finite)
                advance(1)
        checks.now()
        if state is not None:
            state.wait()
        return rows

    def _batches(self, count: int) -> Iterator[slice]:
        for first in range(0, count, self._batch):
            yield slice(first, min(first + self._batch, count))

    def _embed(self, tokens: Tokens, windows: Sequence[int], streams_WTC: Tensor) -> FiniteCheck:
        finite = FiniteCheck()
        for part in self._batches(len(windows)):
            ids_BT = torch.from_numpy(tokens[list(windows[part])]).to(self.device, torch.int64)
            stream_BTC = self.model.embed(ids_BT)
            self._note(finite, 0, windows[part], stream_BTC)
            streams_WTC[part].copy_(stream_BTC, non_blocking=True)
        finite.send()
        return finite

    def _note(
        self, finite: FiniteCheck, boundary: int, windows: Sequence[int], stream_BTC: Tensor
    ) -> None:
        for window, stream_TC in zip(windows, stream_BTC, strict=True):
            finite.note(boundary, window, stream_TC)

    def _run_layer(
        self,
        layer: int,
        windows: Sequence[int],
        streams_WTC: Tensor,
        with_mlp: bool,
        place: _Place,
    ) -> tuple[dict[str, Tensor], FiniteCheck]:
        """Run a layer over all windows, in place; its MLP's rows where they are wanted."""
        kept: dict[str, Tensor] = {}
        finite = FiniteCheck()
        part = slice(0, 0)

        def keep(name: str, rows_BTn: Tensor) -> None:
            key = f"mlp {name} {layer}"
            if key not in kept:
                shape = (*streams_WTC.shape[:2], rows_BTn.shape[-1])
                kept[key] = torch.empty(
                    shape,
                    dtype=rows_BTn.dtype,
                    device=place.of_rows,
                    pin_memory=place.pinned(place.of_rows),
                )
            shape = (part.stop - part.start, *kept[key].shape[1:])
            kept[key][part].copy_(rows_BTn.reshape(shape), non_blocking=True)

        def tap(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            keep("input", args[0])
            keep("product", output if module.bias is None else output - module.bias)

        with contextlib.ExitStack() as stack:
            inputs = Inputs([streams_WTC], self._batch, self.device)
            run = stack.enter_context(self.model.running(layer, inputs, tapped=with_mlp))
            if with_mlp:
                path = self._architecture.down_projections[layer]
                module = self.model.layers[layer].get_submodule(path)
                stack.callback(module.register_forward_hook(tap).remove)
            for part in self._batches(len(streams_WTC)):
                x_BTC = streams_WTC[part].to(self.device, non_blocking=True)
                y_BTC = run(x_BTC)
                self._note(finite, layer + 1, windows[part], y_BTC)
                streams_WTC[part].copy_(y_BTC, non_blocking=True)
        finite.send()
        if with_mlp and not len(streams_WTC):  # of more peers than windows
            for name, width in self._mlp_widths(layer).items():
                shape = (*streams_WTC.shape[:2], width)
                kept[f"mlp {name} {layer}"] = streams_WTC.new_empty(shape)
        return kept, finite

    def _mlp_widths(self, layer: int) -> dict[str, int]:
        return {"input": self._architecture.inner_sizes[layer], "product": self.hidden_size}


class _Checks:
    """Looks at numbers one layer late, while the next one runs, so that the device never waits.

    Where streams or rows are copied to the host, it waits for the device: they are read there.
    """

    def __init__(self, model: StreamedModel, device: torch.device, place: _Place) -> None:
        self._model, self._device = model, device
        self._wait = device.type == "cuda" and "cpu" in (place.of_streams.type, place.of_rows.type)
        self._late: list[FiniteCheck] = []

    def later(self, finite: FiniteCheck) -> None:
        """Look at the layer before this one."""
        if self._wait:
            synchronize(self._device)
        if self._late:
            self.now()
        self._late.append(finite)

    def now(self) -> None:
        """Raise for what was found so far: a weight before the streams that it spoiled."""
        self._model.check_weights()
        for finite in self._late:
            finite.check()
        self._late.clear()


@functools.cache
def prove_streamed(path: Path, device: torch.device, experts: int | None = None) -> float:
    """Once in a process, before real layers are read: run a small model of the family both ways.

    Parameters
    ----------
    path, device
        Of the real model.
    experts
        Routed experts of a part, as ``StreamedModel.hold`` gives them.

    Returns
    -------
    float
        Largest difference of a stream, relative to its largest entry; 0 on a CPU.

    Raises
    ------
    UnsupportedArchitectureError
        If the family cannot be run layer by layer.
    """
    checkpoint = open_checkpoint(path)

    def load(
        folder: Path, architecture: Architecture, num_layers: int, dtype: torch.dtype
    ) -> StreamingEngine:
        engine = StreamingEngine(
            open_checkpoint(folder),
            architecture,
            num_layers=num_layers,
            dtype=dtype,
            device=device,
            batch=2,
        )
        if experts is not None:
            # The small model has 8 experts at most: 3 leave a shorter part at the end.
            engine.model.hold(min(experts, 3), batch_tokens=1, tokens=1)
        return engine

    return check_streamed(
        checkpoint, inspect_architecture(checkpoint), load, device, in_parts=experts is not None
    )


@dataclass(frozen=True)
class _Place:
    """Where the streams of all windows and the rows live: on the device if they fit there."""

    device: torch.device
    of_streams: torch.device
    of_rows: torch.device

    @staticmethod
    def for_sweep(
        engine: StreamingEngine,
        num_windows: int,
        window_length: int,
        boundaries: Sequence[int],
        mlp_layers: Sequence[int],
    ) -> _Place:
        model, cpu = engine.model, torch.device("cpu")
        if engine.device.type != "cuda":
            return _Place(cpu, cpu, cpu)
        itemsize, width = model.dtype.itemsize, model.hidden_size
        row = num_windows * window_length * itemsize
        stream = row * width
        inner = [engine._architecture.inner_sizes[layer] for layer in mlp_layers]
        rows = stream * len(boundaries) + sum(row * (f + width) for f in inner)
        batch = engine._batch * window_length * width * itemsize * _WIDTHS_AT_ONCE
        weights = model.bytes_at_once()
        left = SHARE_OF_FREE_MEMORY * free_bytes(engine.device) - weights - batch
        return _Place(
            engine.device,
            engine.device if 2 * stream <= left else cpu,  # the second is the copy being saved
            engine.device if 2 * stream + rows <= left else cpu,
        )

    def pinned(self, where: torch.device) -> bool:
        """Whether memory there has to be page-locked, to be copied while the device computes."""
        return self.device.type == "cuda" and where.type == "cpu"

    def streams(self, tensor: Tensor) -> Tensor:
        """Streams that were read back, where they belong."""
        moved = tensor.to(self.of_streams)
        return moved.pin_memory() if self.pinned(self.of_streams) else moved

    def row(self, tensor: Tensor) -> Tensor:
        """A row that was read back, where it belongs."""
        return tensor.to(self.of_rows)

    def row_of(self, streams_WTC: Tensor) -> Tensor:
        """A copy of the streams, where rows belong."""
        row = torch.empty(
            streams_WTC.shape,
            dtype=streams_WTC.dtype,
            device=self.of_rows,
            pin_memory=self.pinned(self.of_rows),
        )
        return row.copy_(streams_WTC)
