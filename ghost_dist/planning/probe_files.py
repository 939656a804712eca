"""How fast files come and go: the checkpoint's file system, the run's, and the statistics store."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.safetensors_header import TensorInfo
from ghost_dist.checkpoint.weight_reader import BLOCK_BYTES, READERS
from ghost_dist.devices import synchronize
from ghost_dist.statistics.moments import Moments
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.store_plan import StatisticsPlan
from ghost_dist.statistics.sum_costs import saved_by_strips

_MOST_BYTES, _MOST_S = 2_000_000_000, 2.0
_LOADED_BYTES = 256 << 20
_WRITTEN_BYTES = 512 << 20
_SAMPLES = 64
_SPARSE = 0.5  # a file of which less than this is on the disk was never written


@dataclass(frozen=True)
class FileRates:
    """As :class:`ghost_dist.planning.rates.Rates` names them."""

    read: float
    read_from: str
    load: float
    load_tensor_s: float
    write: float
    commit: float
    commit_s: float
    store_read: float


def measure_files(
    checkpoint: Checkpoint, folder: Path, device: torch.device, dtype: torch.dtype
) -> FileRates:
    """Measure with a temporary folder below ``folder``, which must be writable."""
    with tempfile.TemporaryDirectory(prefix=".ghost-dist-probe-", dir=folder) as name:
        scratch = Path(name)
        write, written = _write(scratch / "probe.bin")
        shards = [checkpoint.path / file for file in checkpoint.headers]
        real = [path for path in shards if not _is_sparse(path)]
        read = _read(real or [written])
        read_from = "checkpoint" if real else "a file of the run's file system"
        load, load_tensor_s = _load(checkpoint, device, dtype)
        commit, commit_s, store_read = _commit(scratch, device)
    return FileRates(read, read_from, load, load_tensor_s, write, commit, commit_s, store_read)


def existing_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def cached_share(checkpoint: Checkpoint) -> float:
    """Share of the checkpoint that is in the page cache, tried at evenly spaced places.

    0 where the file system cannot say.
    """
    sizes = {file: (checkpoint.path / file).stat().st_size for file in checkpoint.headers}
    total, found = sum(sizes.values()), 0
    for sample in range(_SAMPLES):
        offset = total * sample // _SAMPLES
        for file, size in sizes.items():
            if offset < size:
                found += _is_cached(checkpoint.path / file, offset)
                break
            offset -= size
    return found / _SAMPLES


def _is_cached(path: Path, offset: int) -> bool:
    if _is_sparse(path):
        return False  # what was never written has no page
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _is_sparse(path: Path) -> bool:
    status = path.stat()
    return status.st_blocks * 512 < _SPARSE * status.st_size


def _write(path: Path) -> tuple[float, Path]:
    """Blocks of numbers that no file system can shrink, brought to the disk."""
    generator = np.random.default_rng(0)
    block = generator.bytes(BLOCK_BYTES)
    began = time.perf_counter()
    written = 0
    with path.open("wb", buffering=0) as file:
        while written < _WRITTEN_BYTES and (time.perf_counter() - began) < _MOST_S / 2:
            written += file.write(block)
        os.fsync(file.fileno())
    return written / (time.perf_counter() - began), path


def _read(paths: Sequence[Path]) -> float:
    """Blocks from several threads, none of them from the page cache."""
    blocks = list(islice(_blocks(paths), _MOST_BYTES // BLOCK_BYTES))
    descriptors = {path: os.open(path, os.O_RDONLY) for path in {path for path, _, _ in blocks}}
    try:
        for path, offset, length in blocks:
            os.posix_fadvise(descriptors[path], offset, length, os.POSIX_FADV_DONTNEED)
        buffers = [bytearray(BLOCK_BYTES) for _ in range(READERS)]
        for buffer in buffers:
            buffer[::4096] = b"x" * len(buffer[::4096])  # no page is met for the first time
        began = time.perf_counter()

        def reader(number: int) -> int:
            total = 0
            for path, offset, length in blocks[number::READERS]:
                if time.perf_counter() - began > _MOST_S:
                    break
                view = memoryview(buffers[number])[:length]
                total += os.preadv(descriptors[path], [view], offset)
            return total

        with ThreadPoolExecutor(READERS) as pool:
            total = sum(pool.map(reader, range(READERS)))
        return total / (time.perf_counter() - began)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _blocks(paths: Sequence[Path]) -> Iterator[tuple[Path, int, int]]:
    for path in paths:
        size = path.stat().st_size
        for offset in range(0, size, BLOCK_BYTES):
            yield path, offset, min(BLOCK_BYTES, size - offset)


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s of large tensors to the device and checked, and seconds of each small one."""
    by_size = sorted(checkpoint.tensors.values(), key=lambda tensor: -tensor.nbytes)
    large, total = [], 0
    for tensor in by_size:
        if total < _LOADED_BYTES:
            large.append(tensor)
            total += min(tensor.nbytes, _LOADED_BYTES)
    small = [tensor for tensor in by_size[::-1][:64] if tensor.nbytes < 1 << 20]
    began = time.perf_counter()
    _pieces(checkpoint, small, device, dtype)
    each = (time.perf_counter() - began) / len(small) if small else 0.0
    _pieces(checkpoint, large, device, dtype)  # brings the pages into the cache
    began = time.perf_counter()
    loaded = _pieces(checkpoint, large, device, dtype)
    seconds = time.perf_counter() - began
    return loaded / max(0.1 * seconds, seconds - each * len(large)), each


def _pieces(
    checkpoint: Checkpoint, tensors: Sequence[TensorInfo], device: torch.device, dtype: torch.dtype
) -> int:
    """Load tensors, of those that are too large the first rows; returns the bytes."""
    total = 0
    for tensor in tensors:
        with safe_open(checkpoint.path / tensor.file, framework="pt") as opened:
            whole = opened.get_slice(tensor.name)
            rows = tensor.shape[0] if tensor.shape else 1
            rows = max(1, min(rows, _LOADED_BYTES * rows // max(1, tensor.nbytes)))
            piece = whole[:rows] if tensor.shape else opened.get_tensor(tensor.name)
            loaded = piece.to(device, dtype, copy=True)
            bool(torch.isfinite(loaded).all())
            total += piece.nbytes
    return total


def _commit(scratch: Path, device: torch.device) -> tuple[float, float, float]:
    """Bytes/s into the store, seconds of a tiny range, bytes/s out of it onto the device."""
    spent, nbytes = [], []
    read = 1.0
    for size in (8, 4096):
        plan = StatisticsPlan({}, {"probe": "moments"}, ((0,), (1,)), 1)
        store = StatisticsStore(scratch / f"{size}.zarr", plan)
        matrix = torch.rand(size, size, dtype=torch.float64)
        matrix = matrix + matrix.T
        row = torch.rand(size, dtype=torch.float64)
        sums = Moments(1, matrix, matrix.T.contiguous(), row, row, row, row[:1])
        for range_id in (0, 1):
            began = time.perf_counter()
            store.commit(range_id, {"probe": sums})
            seconds = time.perf_counter() - began
        spent.append(seconds)
        in_memory = sum(array.nbytes for array in sums.arrays().values())
        nbytes.append(in_memory - saved_by_strips(size, 1))
        began = time.perf_counter()
        store.read(1, device=device)
        synchronize(device)
        read = time.perf_counter() - began
    return nbytes[1] / max(1e-6, spent[1] - spent[0]), spent[0], nbytes[1] / read
