"""Tensors straight from safetensors files onto a device, read ahead by several threads.

A model that is larger than memory is read again and again. So nothing is mapped: threads read
blocks with ``pread``, on a GPU into a few pinned buffers that are copied on while the next blocks
are read, and what was read may be dropped from the page cache, where it would only push out what
others need.
"""

from __future__ import annotations

import datetime as dt
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ghost_dist.checkpoint.block_scales import dequantised
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.safetensors_header import TensorInfo
from ghost_dist.errors import CheckpointError

READERS = 8
"""Threads: what it takes to keep fast disks busy; more than the cores of a small machine is fine,
since they wait for the disk."""
BLOCK_BYTES = 32 << 20
_BUFFERS_PER_READER = 2

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _State:
    """What a file was when the checkpoint was opened."""

    size: int
    mtime_ns: int


class Reading:
    """Tensors that are being read."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        block: tuple[int, int] | None,
        pieces: Sequence[Future[Any]],
    ) -> None:
        self._tensors, self._scales, self._block = dict(tensors), scales, block
        self._pieces = pieces

    def wait(self) -> dict[str, Tensor]:
        """All tensors by name, on the device in the dtype of the file; bfloat16 if that is FP8.

        Raises
        ------
        CheckpointError
            If a file could not be read to the end.
        """
        for piece in self._pieces:
            copied = piece.result()
            if copied is not None:
                torch.cuda.current_stream().wait_event(copied)
        for name, scales in self._scales.items():
            assert self._block is not None, "scales come with a block"
            self._tensors[name] = dequantised(self._tensors[name], scales, self._block)
        self._scales = {}
        return dict(self._tensors)

    def cancel(self) -> None:
        """Read no further; the tensors are of no use then."""
        for piece in self._pieces:
            piece.cancel()
        for piece in self._pieces:
            if not piece.cancelled():
                piece.exception()


class WeightReader:
    """Reads tensors of one checkpoint in the order in which they are asked for.

    Parameters
    ----------
    checkpoint
        Whose files must not change while this object lives.
    device
        Where the tensors go.
    keep_cached
        Leave what was read in the page cache: right where the checkpoint fits there and is read
        again.

    Attributes
    ----------
    bytes_read
        So far, counting what is being read.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, *, keep_cached: bool = False
    ) -> None:
        self._checkpoint, self._device, self._keep_cached = checkpoint, device, keep_cached
        self.bytes_read = 0
        self._states = {file: self._state(file) for file in checkpoint.headers}
        self._files: dict[str, int] = {}
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        self._local = threading.local()

    def start(self, names: Sequence[str], rows: Mapping[str, range] | None = None) -> Reading:
        """Begin to read tensors by name; memory on the device is taken at once.

        Parameters
        ----------
        names
            Of the tensors.
        rows
            Of some tensors only these entries along the first dimension; none of them in FP8.

        Raises
        ------
        CheckpointError
            If a file is gone or is not what it was when the checkpoint was opened.
        """
        checkpoint = self._checkpoint
        scale_of = {name: checkpoint.scales[name] for name in names if name in checkpoint.scales}
        infos = sorted(
            (
                *(_rows_of(checkpoint.tensors[name], (rows or {}).get(name)) for name in names),
                *scale_of.values(),
            ),
            key=lambda i: (i.file, i.offset),
        )
        for file in dict.fromkeys(info.file for info in infos):
            self._check_unchanged(file)
        tensors: dict[str, Tensor] = {}
        pieces: list[tuple[TensorInfo, int, Tensor]] = []
        for info in infos:
            raw = torch.empty(info.nbytes, dtype=torch.uint8, device=self._device)
            tensors[info.name] = raw.view(DTYPES[info.dtype]).view(info.shape)
            for first in range(0, info.nbytes, BLOCK_BYTES):
                part = raw[first : first + BLOCK_BYTES]
                pieces.append((info, info.offset + first, part))
        ready = None
        if self._device.type == "cuda":
            # Earlier work on the memory that the allocator gave us may still be under way.
            ready = torch.cuda.current_stream().record_event()
        self.bytes_read += sum(info.nbytes for info in infos)
        started = [
            self._pool.submit(self._read, info, offset, part, ready)
            for info, offset, part in pieces
        ]
        scales = {name: tensors.pop(info.name) for name, info in scale_of.items()}
        return Reading(tensors, scales, checkpoint.block, started)

    def close(self) -> None:
        """End the threads and close the files."""
        self._pool.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _state(self, file: str) -> _State:
        found = (self._checkpoint.path / file).stat()
        return _State(found.st_size, found.st_mtime_ns)

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
                f"{path} has changed since the run began: {known.size} bytes of "
                f"{_time(known.mtime_ns)} then, {found.size} bytes of {_time(found.mtime_ns)} now. "
                "Sums of two checkpoints must not be mixed. Put the old file back and continue, or "
                "start over with another output.path."
            )

    def _read(self, info: TensorInfo, offset: int, part: Tensor, ready: Any) -> Any:
        """Fill ``part`` from the file; on a GPU an event that says when the copy is done."""
        if self._device.type != "cuda":
            self._fill(info, offset, part)
            return None
        buffer, copied, stream = self._next_buffer()
        copied.synchronize()
        view = buffer[: part.numel()]
        self._fill(info, offset, view)
        # The tensor may have been made in inference mode, which is a thread's own.
        with torch.inference_mode(), torch.cuda.stream(stream):
            stream.wait_event(ready)
            part.copy_(view, non_blocking=True)
            copied.record(stream)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(stream)
        return done

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
            path = Path(self._checkpoint.path) / info.file
            raise CheckpointError(
                f"{path}: tensor {info.name} cannot be read: {error.strerror}. Check the disk; the "
                "same command continues."
            ) from error
        if not self._keep_cached and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, len(memory), os.POSIX_FADV_DONTNEED)

    def _next_buffer(self) -> tuple[Tensor, Any, Any]:
        """A pinned buffer of this thread, the event of its last copy, and the thread's stream."""
        local = self._local
        if not hasattr(local, "buffers"):
            torch.cuda.set_device(self._device)
            local.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            events = [torch.cuda.Event() for _ in range(_BUFFERS_PER_READER)]  # type: ignore[no-untyped-call]
            local.buffers = [
                (torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True), event)
                for event in events
            ]
            local.turn = 0
        local.turn = (local.turn + 1) % _BUFFERS_PER_READER
        return (*local.buffers[local.turn], local.stream)


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
