"""Tensors straight from safetensors files onto a device, read ahead by several threads.

Nothing is mapped: threads read blocks with ``pread``, on a GPU into a few pinned buffers that are
copied on while the next blocks are read. What was read may be dropped from the page cache, where it
would only push out what others need.
"""

from __future__ import annotations

import datetime as dt
import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ghost_dist import devices
from ghost_dist.checkpoint.peers import ALONE, Peers
from ghost_dist.checkpoint.reader import DTYPES, Checkpoint
from ghost_dist.checkpoint.tensor_files import TensorInfo, dequantised
from ghost_dist.errors import CheckpointError

READERS = 8
"""Threads: what it takes to keep fast disks busy; more than the cores of a small machine is fine,
since they wait for the disk."""
BLOCK_BYTES = 32 << 20
_BUFFERS_PER_READER = 2
_ALIGNMENT = 256
"""Bytes; where tensors begin in memory that ranks fill together, as the allocator aligns them."""


@dataclass
class Reading:
    _tensors: dict[str, Tensor]
    _scales: Mapping[str, tuple[Tensor, tuple[int, int]]]
    _pieces: Sequence[Future[devices.Event | None]]
    _arrive: Callable[[Sequence[devices.Event | None]], None]

    def wait(self) -> dict[str, Tensor]:
        """All tensors by name, on the device as stored; FP8 as bfloat16. Collective among peers."""
        self._arrive([piece.result() for piece in self._pieces])
        for name, (scales, block) in self._scales.items():
            self._tensors[name] = dequantised(self._tensors[name], scales, block)
        self._scales = {}
        return dict(self._tensors)

    def cancel(self) -> None:
        """Read no further; the tensors are of no use then."""
        for piece in self._pieces:
            piece.cancel()
        for piece in self._pieces:
            if not piece.cancelled() and piece.exception() is None:
                devices.arrived(piece.result())  # other tensors get the memory now


class WeightReader:
    """Reads tensors of one checkpoint in the order in which they are asked for.

    ``keep_cached`` leaves what was read in the page cache. ``peers`` ask for the same tensors in
    the same order: each reads its part (see ``bytes_read``) and gets the rest from the others.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        keep_cached: bool = False,
        peers: Peers = ALONE,
    ) -> None:
        self._checkpoint, self._keep_cached, self._peers = checkpoint, keep_cached, peers
        self._device = devices.numbered(device)
        self._side: devices.Stream | None = None
        self.bytes_read = 0
        self._states = {file: self._state(file) for file in checkpoint.headers}
        self._files: dict[str, int] = {}
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        self._local = threading.local()

    def start(self, names: Sequence[str], rows: Mapping[str, range] | None = None) -> Reading:
        """Begin to read tensors, of those in ``rows`` these entries; memory is taken at once.

        A file that is not what it was when the checkpoint was opened is an error.
        """
        checkpoint = self._checkpoint
        scale_of = {name: checkpoint.scales[name] for name in names if name in checkpoint.scales}
        wanted = {
            **{n: _rows_of(checkpoint.tensors[n], (rows or {}).get(n)) for n in names},
            **{scales.info.name: scales.info for scales in scale_of.values()},
        }
        wanted = dict(sorted(wanted.items(), key=lambda item: (item[1].file, item[1].offset)))
        infos = list(wanted.values())
        for file in dict.fromkeys(info.file for info in infos):
            self._check_unchanged(file)
        memory, raws = self._memory(infos)
        own = None if memory is None else self._peers.part_of(memory.numel())
        tensors: dict[str, Tensor] = {}
        pieces: list[tuple[TensorInfo, int, Tensor]] = []
        for (name, info), (begin, raw) in zip(wanted.items(), raws, strict=True):
            tensors[name] = raw.view(DTYPES[info.dtype]).view(info.shape)
            first, last = 0, info.nbytes
            if own is not None:
                first, last = max(first, own.start - begin), min(last, own.stop - begin)
            for at in range(first, last, BLOCK_BYTES):
                part = raw[at : min(at + BLOCK_BYTES, last)]
                pieces.append((info, info.offset + at, part))
        # Earlier work on the memory that the allocator gave us may still be under way.
        ready = devices.mark(self._device)
        self.bytes_read += sum(part.numel() for _, _, part in pieces)
        started = [
            self._pool.submit(self._read, info, offset, part, ready)
            for info, offset, part in pieces
        ]
        scales = {n: (tensors.pop(s.info.name), s.block) for n, s in scale_of.items()}

        def arrive(copied: Sequence[devices.Event | None]) -> None:
            if memory is not None:
                self._exchange(memory, [ready, *copied])
            else:
                self._wait_for(copied)

        return Reading(tensors, scales, started, arrive)

    def _memory(
        self, infos: Sequence[TensorInfo]
    ) -> tuple[Tensor | None, list[tuple[int, Tensor]]]:
        """Memory of each tensor; of ranks that share, in one piece with the place of each there."""
        if self._peers.count == 1:
            separate = [
                torch.empty(info.nbytes, dtype=torch.uint8, device=self._device) for info in infos
            ]
            return None, [(0, raw) for raw in separate]
        begins, end = [], 0
        for info in infos:
            begins.append(end)
            end += -(-info.nbytes // _ALIGNMENT) * _ALIGNMENT
        whole = _ALIGNMENT * self._peers.count
        memory = torch.empty(-(-end // whole) * whole, dtype=torch.uint8, device=self._device)
        return memory, [
            (begin, memory[begin : begin + info.nbytes])
            for begin, info in zip(begins, infos, strict=True)
        ]

    def _exchange(self, memory: Tensor, behind: Sequence[devices.Event | None]) -> None:
        """Get what the others read, while the device still computes with what came before."""
        if self._device.type != "cuda":
            self._peers.gather(memory)
            return
        if self._side is None:
            self._side = devices.side_stream(self._device)
        with devices.on_stream(self._side):
            self._wait_for(behind)
            self._peers.gather(memory)
        devices.wait_for(self._device, devices.mark_of(self._side))

    def _wait_for(self, copied: Sequence[devices.Event | None]) -> None:
        for event in copied:
            devices.wait_for(self._device, event)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _state(self, file: str) -> tuple[int, int]:
        """Size, and nanoseconds of the last change."""
        found = (self._checkpoint.path / file).stat()
        return found.st_size, found.st_mtime_ns

    def _check_unchanged(self, file: str) -> None:
        path = self._checkpoint.path / file
        try:
            found = self._state(file)
            if file not in self._files:
                self._files[file] = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read any more: {error.strerror}. Put the file back; the same "
                "command continues."
            ) from error
        known = self._states[file]
        if found != known:
            raise CheckpointError(
                f"{path} has changed since the run began: {known[0]} bytes of {_time(known[1])} "
                f"then, {found[0]} bytes of {_time(found[1])} now. "
                "Sums of two checkpoints must not be mixed. Put the old file back and continue, or "
                "start over with another output.path."
            )

    def _read(
        self, info: TensorInfo, offset: int, part: Tensor, ready: devices.Event | None
    ) -> devices.Event | None:
        """Fill ``part`` from the file; on a GPU an event that says when the copy is done."""
        if ready is None:
            self._fill(info, offset, part)
            return None
        stream, buffer = self._next_buffer()
        devices.arrived(buffer.copied)
        view = buffer.memory[: part.numel()]
        self._fill(info, offset, view)
        # The tensor may have been made in inference mode, which is a thread's own.
        with torch.inference_mode(), devices.on_stream(stream):
            devices.wait_for(self._device, ready)
            part.copy_(view, non_blocking=True)
        buffer.copied = devices.mark_of(stream)
        return buffer.copied

    def _fill(self, info: TensorInfo, offset: int, part: Tensor) -> None:
        descriptor = self._files[info.file]
        memory = memoryview(part.numpy())  # type: ignore[arg-type]
        done = 0
        try:
            while done < len(memory):
                count = os.preadv(descriptor, [memory[done:]], offset + done)
                if count == 0:
                    raise OSError(0, f"it ends at byte {offset + done}")
                done += count
        except OSError as error:
            raise CheckpointError(
                f"{self._checkpoint.path / info.file}: tensor {info.name} cannot be read: "
                f"{error.strerror}. Check the disk; the same command continues."
            ) from error
        if not self._keep_cached and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, len(memory), os.POSIX_FADV_DONTNEED)

    def _next_buffer(self) -> tuple[devices.Stream, _Buffer]:
        """This thread's stream, and the pinned buffer of this thread that was used longest ago."""
        local = self._local
        if not hasattr(local, "buffers"):
            devices.begin(self._device)
            local.stream = devices.side_stream(self._device)
            local.buffers = itertools.cycle([_Buffer() for _ in range(_BUFFERS_PER_READER)])
        return local.stream, next(local.buffers)


class _Buffer:
    """Page-locked memory, and when the last copy out of it is done."""

    def __init__(self) -> None:
        self.memory = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
        self.copied: devices.Event | None = None


def _rows_of(info: TensorInfo, rows: range | None) -> TensorInfo:
    """A tensor of which only some entries along the first dimension are read: one piece of it."""
    if rows is None:
        return info
    nbytes = info.nbytes // info.shape[0]
    return replace(
        info,
        shape=(len(rows), *info.shape[1:]),
        offset=info.offset + rows.start * nbytes,
        nbytes=len(rows) * nbytes,
    )


def _time(nanoseconds: int) -> str:
    return dt.datetime.fromtimestamp(nanoseconds / 1e9, tz=dt.UTC).isoformat(timespec="seconds")
