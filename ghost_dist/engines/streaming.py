"""Layer after layer: each is read once, runs all windows, and gives its memory to the next.

    embeddings -> streams of all windows -> layer 0 -> layer 1 -> ... -> last boundary
                                              kept rows: boundaries and MLP inputs that sinks want

For checkpoints that are larger than the device, or than the machine. What stays is the streams of
all windows at one boundary, and the *rows*: streams of those boundaries that sinks want. Sinks are
fed at the end, range by range, so only one range's sums exist at a time; rows are far smaller than
sums (T C against C^2 numbers of four times the size).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ghost_dist.checkpoint.architecture import Architecture, inspect_architecture
from ghost_dist.checkpoint.reader import Checkpoint, open_checkpoint
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.devices import SHARE_OF_FREE_MEMORY, free_bytes, mark, synchronize
from ghost_dist.engines.base import Sink, Tokens
from ghost_dist.engines.conformance import check_streamed
from ghost_dist.engines.peers import ALONE, Peers
from ghost_dist.engines.streamed_model import StreamedModel
from ghost_dist.engines.sweep import Tap, sweep
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
            Called with the number of tokens just finished, by all peers; those of a layer count as
            its share.
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
        rows = Rows(tuple(windows), peers=self._peers)
        part = self._peers.part_of(len(windows))
        own = tokens[list(windows[part.start : part.stop])]
        shape = (*own.shape, self.hidden_size)
        place = _Place.for_sweep(self, len(own), own.shape[1], boundaries, mlp_layers)
        saved = None if state is None else state.load()
        if saved is not None:
            streams_WTC = place.streams(saved.streams_WTC)
            rows.tensors = {name: place.row(tensor) for name, tensor in saved.rows.items()}
        else:
            streams_WTC = place.empty(shape, self.model.dtype, place.of_streams)
        total, ran, told = len(rows.windows) * tokens.shape[1], 0, 0

        def ours(count: int) -> None:  # stands for what the peers run at the same time
            nonlocal ran, told
            ran += count
            now = total * ran // max(1, own.size)
            advance(now - told)
            told = now

        checks = _Checks(self.model, rows.windows[part.start : part.stop], place)
        inner_sizes = {layer: self._architecture.inner_sizes[layer] for layer in mlp_layers}
        keep = _Keep(rows, streams_WTC, place, boundaries, inner_sizes, state)
        sweep(
            self.model,
            [Variant()],
            own,
            [checks, keep],
            batch=self._batch,
            stop=boundaries[-1],
            streams_WTC=streams_WTC,
            done=None if saved is None else saved.boundary,
            advance=ours,
        )
        checks.now()
        advance(total - told)
        return rows


class _Keep(Tap):
    """Copies of what sinks want, and the state of a sweep that can go on."""

    def __init__(
        self,
        rows: Rows,
        streams_WTC: Tensor,
        place: _Place,
        boundaries: Sequence[int],
        inner_sizes: Mapping[int, int],
        state: StreamState | None,
    ) -> None:
        self._rows, self._place, self._state = rows.tensors, place, state
        self._boundaries, self.mlp_layers = boundaries, tuple(inner_sizes)
        self._inner_sizes, self._like_WTC = inner_sizes, streams_WTC

    def mlp(self, layer: int, part: slice, input_BTF: Tensor, product_BTC: Tensor) -> None:
        """Keep a batch's."""
        for row_WTn, rows_BTn in zip(self._of_mlp(layer), (input_BTF, product_BTC), strict=True):
            row_WTn[part].copy_(rows_BTn, non_blocking=True)

    def passed(self, boundary: int, streams_WTC: Tensor) -> None:
        """Keep the streams of a boundary; save what the layer before it has left."""
        name, state = f"boundary {boundary}", self._state
        kept: dict[str, Tensor] = {}
        if boundary - 1 in self._inner_sizes:
            rows = self._of_mlp(boundary - 1)  # also where no window has come
            kept = dict(zip(_mlp_names(boundary - 1), rows, strict=True))
        if boundary in self._boundaries:
            kept[name] = self._rows[name] = self._place.row_of(streams_WTC)
        if state is None:
            return
        for kept_name, row_WTn in kept.items():
            state.keep(kept_name, row_WTn, mark(self._place.device))
        if boundary > 0:
            state.save(boundary, name if boundary in self._boundaries else streams_WTC.clone)

    def _of_mlp(self, layer: int) -> list[Tensor]:
        """Where all windows' rows of a down_proj are: its input, and what it makes."""
        widths = (self._inner_sizes[layer], self._like_WTC.shape[2])
        for name, width in zip(_mlp_names(layer), widths, strict=True):
            if name not in self._rows:
                shape = (*self._like_WTC.shape[:2], width)
                self._rows[name] = self._place.empty(
                    shape, self._like_WTC.dtype, self._place.of_rows
                )
        return [self._rows[name] for name in _mlp_names(layer)]


def _mlp_names(layer: int) -> tuple[str, str]:
    return f"mlp input {layer}", f"mlp product {layer}"


class _Checks(Tap):
    """Looks at numbers one layer late, while the next one runs, so that the device never waits.

    Where streams or rows are copied to the host, it waits for the device: they are read there.
    """

    def __init__(self, model: StreamedModel, windows: Sequence[int], place: _Place) -> None:
        self._model, self._windows, self._device = model, windows, place.device
        on_host = "cpu" in (place.of_streams.type, place.of_rows.type)
        self._wait = self._device.type == "cuda" and on_host
        self._finite, self._late = FiniteCheck(), list[FiniteCheck]()

    def stream(self, boundary: int, part: slice, stream_BTC: Tensor) -> None:
        """Note a batch."""
        for window, stream_TC in zip(self._windows[part], stream_BTC, strict=True):
            self._finite.note(boundary, window, stream_TC)

    def passed(self, boundary: int, streams_WTC: Tensor) -> None:  # noqa: ARG002 - as a Tap
        """Look at the layer before this one."""
        self._finite.send()
        if self._wait:
            synchronize(self._device)
        if self._late:
            self.now()
        self._late.append(self._finite)
        self._finite = FiniteCheck()

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

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, where: torch.device) -> Tensor:
        """Memory there."""
        return torch.empty(shape, dtype=dtype, device=where, pin_memory=self.pinned(where))

    def streams(self, tensor: Tensor) -> Tensor:
        """Streams that were read back, where they belong."""
        moved = tensor.to(self.of_streams)
        return moved.pin_memory() if self.pinned(self.of_streams) else moved

    def row(self, tensor: Tensor) -> Tensor:
        """A row that was read back, where it belongs."""
        return tensor.to(self.of_rows)

    def row_of(self, streams_WTC: Tensor) -> Tensor:
        """A copy of the streams, where rows belong."""
        row = self.empty(tuple(streams_WTC.shape), streams_WTC.dtype, self.of_rows)
        return row.copy_(streams_WTC)
