"""Layer after layer: each is read once, runs all windows, and gives its memory to the next.

    embeddings -> streams of all windows -> layer 0 -> layer 1 -> ... -> last boundary
                                              kept rows: boundaries and MLP inputs that sinks want

For checkpoints that are larger than the device, or than the machine. What stays is the streams of
all windows at one boundary, and the *rows*: streams of those boundaries that sinks want. Sinks are
fed at the end, range by range, so only one range's sums exist at a time; rows are far smaller than
sums (T C against C^2 numbers of four times the size).
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.architecture import Architecture, inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.devices import SHARE_OF_FREE_MEMORY, empty_at, free_bytes, mark, synchronize
from ghost_dist.engines.conformance import check_conformance
from ghost_dist.engines.offloaded import OffloadedModel
from ghost_dist.engines.resident import Engine
from ghost_dist.engines.sweep import Tap, sweep
from ghost_dist.statistics.span_sums import Collector, FiniteCheck
from ghost_dist.statistics.stream_state import StreamState

_WIDTHS_AT_ONCE = 16  # streams' worth of memory that a batch takes inside a layer (attention, MLP)


class Rows(Tap):
    """Streams of all windows of a sweep at the places that sinks want, by name.

    ``"boundary b"`` (W, T, C), ``"mlp input l"`` (W, T, F), ``"mlp product l"`` (W, T, C): of peers
    those of this one's part of the windows. With a ``state`` they are saved on the way.
    """

    def __init__(
        self,
        model: OffloadedModel,
        windows: Sequence[int],
        length: int,
        place: torch.device,
        boundaries: Sequence[int],
        mlp_layers: Sequence[int],
        state: StreamState | None,
    ) -> None:
        self.windows, self.tensors = tuple(windows), dict[str, Tensor]()
        self._own = model.peers.part_of(len(windows))
        self._model, self._length, self._place, self._state = model, length, place, state
        self._boundaries, self.mlp_layers = boundaries, mlp_layers

    def mlp(self, layer: int, part: slice, input_BTF: Tensor, product_BTC: Tensor) -> None:
        rows = self._of_mlp(layer).values()
        for row_WTn, rows_BTn in zip(rows, (input_BTF, product_BTC), strict=True):
            row_WTn[part].copy_(rows_BTn, non_blocking=True)

    def passed(self, boundary: int, streams_WTC: Tensor) -> None:
        """Keep the streams of a boundary; save what the layer before it has left."""
        name, state, kept = f"boundary {boundary}", self._state, dict[str, Tensor]()
        if boundary - 1 in self.mlp_layers:
            kept = self._of_mlp(boundary - 1)  # also where no window has come
        if boundary in self._boundaries:
            kept[name] = self._row(name, self._model.hidden_size).copy_(streams_WTC)
        if state is None:
            return
        for kept_name, row_WTn in kept.items():
            state.keep(kept_name, row_WTn, mark(self._model.device))
        if boundary > 0:
            state.save(boundary, name if boundary in self._boundaries else streams_WTC.clone)

    def feed(self, windows: Sequence[int], sink: Collector, device: torch.device) -> None:
        """Give a sink what it wants of some windows, in their order; collective over the peers."""
        peers, total = self._model.peers, len(self.windows)
        position = {window: number for number, window in enumerate(self.windows)}
        order = sorted([(b, 0) for b in sink.boundaries] + [(la, 1) for la in sink.mlp_layers])

        def row(name: str, window: int) -> Tensor:
            rows_WTn, number = self.tensors[name], position[window]
            if number in self._own:
                row_Tn = rows_WTn[number - self._own.start].to(device, non_blocking=True)
            else:
                row_Tn = torch.empty(rows_WTn.shape[1:], dtype=rows_WTn.dtype, device=device)
            peers.send(row_Tn, peers.owner_of(number, total))
            return row_Tn

        for window in windows:
            for index, is_mlp in order:
                if is_mlp:
                    given, product = (row(f"mlp {n} {index}", window) for n in ("input", "product"))
                    sink.take_mlp(index, window, given, product)
                else:
                    sink(index, window, row(f"boundary {index}", window))

    def _of_mlp(self, layer: int) -> dict[str, Tensor]:
        inner = self._model.architecture.inner_sizes[layer]
        widths = {f"mlp input {layer}": inner, f"mlp product {layer}": self._model.hidden_size}
        return {name: self._row(name, width) for name, width in widths.items()}

    def _row(self, name: str, width: int) -> Tensor:
        if name not in self.tensors:
            shape = (len(self._own), self._length, width)
            self.tensors[name] = empty_at(self._place, shape, self._model.dtype, self._model.device)
        return self.tensors[name]


class OffloadedEngine(Engine):
    """Runs a model that fits nowhere as a whole, ``batch`` windows per forward.

    A family must have been proven by :func:`prove_offloaded` in this process. Peers of the model
    share the windows as well as the reading, so they make the same calls at the same time.
    """

    def __init__(self, model: OffloadedModel, batch: int) -> None:
        self.model, self._batch, self.device = model, batch, model.device

    def run(
        self,
        tokens: Tokens,
        windows: Sequence[int],
        sink: Collector,
        advance: Callable[[int], None],
    ) -> None:
        """The sink is fed after the last layer; ``advance`` hears of every layer."""
        rows = self.sweep(tokens, windows, sink.boundaries, sink.mlp_layers, advance)
        rows.feed(windows, sink, self.device)

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

        ``advance`` is told the tokens just finished, by all peers; those of a layer count as its
        share. ``state``: where streams are saved, and from where an interrupted sweep goes on.
        """
        assert state is None or state.windows == tuple(windows), "saved streams have an order"
        assert state is None or self.model.peers.count == 1, "peers save no streams"
        model, length = self.model, tokens.shape[1]
        part = model.peers.part_of(len(windows))
        own = tokens[list(windows[part.start : part.stop])]
        of_streams, of_rows = _places(model, self._batch, own.shape, boundaries, mlp_layers)
        rows = Rows(model, windows, length, of_rows, boundaries, mlp_layers, state)
        saved = None if state is None else state.load()
        if saved is not None:
            streams_WTC = saved.streams_WTC.to(of_streams)
            if of_streams != self.device:
                streams_WTC = streams_WTC.pin_memory()
            rows.tensors = {name: tensor.to(of_rows) for name, tensor in saved.rows.items()}
        else:
            shape = (*own.shape, model.hidden_size)
            streams_WTC = empty_at(of_streams, shape, model.dtype, self.device)
        total, ran, told = len(windows) * length, 0, 0

        def ours(count: int) -> None:  # stands for what the peers run at the same time
            nonlocal ran, told
            ran += count
            now = total * ran // max(1, own.size)
            advance(now - told)
            told = now

        on_host = "cpu" in (of_streams.type, of_rows.type)
        checks = _Checks(model, windows[part.start : part.stop], on_host=on_host)
        sweep(
            model,
            [Variant()],
            own,
            [checks, rows],
            batch=self._batch,
            stop=boundaries[-1],
            streams_WTC=streams_WTC,
            done=None if saved is None else saved.boundary,
            advance=ours,
        )
        checks.now()
        advance(total - told)
        return rows


class _Checks(Tap):
    """Looks at numbers a layer late, so that the device never waits; at once if hosts read them."""

    def __init__(self, model: OffloadedModel, windows: Sequence[int], *, on_host: bool) -> None:
        self._model, self._windows, self._wait = model, windows, on_host
        self._finite, self._late = FiniteCheck(), list[FiniteCheck]()

    def stream(self, boundary: int, part: slice, stream_BTC: Tensor) -> None:
        for window, stream_TC in zip(self._windows[part], stream_BTC, strict=True):
            self._finite.note(boundary, window, stream_TC)

    def passed(self, boundary: int, streams_WTC: Tensor) -> None:  # noqa: ARG002 - as a Tap
        self._finite.send()
        if self._wait:
            synchronize(self._model.device)
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
def prove_offloaded(path: Path, device: torch.device, experts: int | None = None) -> float:
    """:func:`check_conformance`, once in a process; ``experts`` as ``hold`` has chosen them."""
    checkpoint = open_checkpoint(path)

    def load(folder: Path, small: Architecture) -> OffloadedEngine:
        source = open_checkpoint(folder)
        model = OffloadedModel(source, small, small.num_layers, torch.float32, device)
        if experts is not None:
            # The small model has 8 experts at most: 3 leave a shorter part at the end.
            model.hold(min(experts, 3), batch_tokens=1, tokens=1)
        return OffloadedEngine(model, 2)

    parts = "" if experts is None else ", its experts in parts"
    return check_conformance(
        checkpoint,
        inspect_architecture(checkpoint),
        load,
        device,
        what=f"run layer by layer{parts}",
        advice="Set engine.kind=resident or tensor_parallel.",
    )


def _places(
    model: OffloadedModel,
    batch: int,
    shape: tuple[int, ...],
    boundaries: Sequence[int],
    mlp_layers: Sequence[int],
) -> tuple[torch.device, torch.device]:
    """Where the streams of all windows and the rows live: on the device if they fit there."""
    cpu, device = torch.device("cpu"), model.device
    if device.type != "cuda":
        return cpu, cpu
    itemsize, width = model.dtype.itemsize, model.hidden_size
    row = shape[0] * shape[1] * itemsize
    stream = row * width
    inner = [model.architecture.inner_sizes[layer] for layer in mlp_layers]
    rows = stream * len(boundaries) + sum(row * (f + width) for f in inner)
    of_batch = batch * shape[1] * width * itemsize * _WIDTHS_AT_ONCE
    left = SHARE_OF_FREE_MEMORY * free_bytes(device) - model.bytes_at_once() - of_batch
    return (
        device if 2 * stream <= left else cpu,  # the second is the copy being saved
        device if 2 * stream + rows <= left else cpu,
    )
