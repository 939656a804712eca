"""How fast files come and go: the checkpoint's file system, the run's, and the statistics store."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.weight_reader import BLOCK_BYTES, READERS
from ghost_dist.devices import synchronize
from ghost_dist.statistics.moments import Moments
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.store_plan import StatisticsPlan
from ghost_dist.statistics.sum_costs import saved_by_strips

_READ_BYTES, _WRITTEN_BYTES, _LOADED_BYTES = 2_000_000_000, 512 << 20, 256 << 20
_LONGEST_S = 2.0
_SAMPLES = 64
_SPARSE = 0.5  # a file of which less than this is on the disk was never written


def measure_files(
    checkpoint: Checkpoint, folder: Path, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Rates of files as ``Rates`` names them; with a temporary folder below ``folder``."""
    with tempfile.TemporaryDirectory(prefix=".ghost-dist-probe-", dir=folder) as name:
        scratch = Path(name)
        write = _write(scratch / "probe.bin")
        real = [path for path in _files(checkpoint) if not _is_sparse(path)]
        commit, commit_s, store_read = _commit(scratch, device)
        return {
            "write": write,
            "read": _read(real or [scratch / "probe.bin"]),
            "read_from": "checkpoint" if real else "a file of the run's file system",
            "load": _load(checkpoint, device, dtype),
            "commit": commit,
            "commit_s": commit_s,
            "store_read": store_read,
        }


def cached_share(checkpoint: Checkpoint) -> float:
    """Share of the checkpoint that is in the page cache, tried at evenly spaced places.

    0 where the file system cannot say.
    """
    sizes = {path: path.stat().st_size for path in _files(checkpoint)}
    total, found = sum(sizes.values()), 0
    for sample in range(_SAMPLES):
        offset = total * sample // _SAMPLES
        for path, size in sizes.items():
            if offset < size:
                found += _is_cached(path, offset)
                break
            offset -= size
    return found / _SAMPLES


def _files(checkpoint: Checkpoint) -> list[Path]:
    return [checkpoint.path / file for file in checkpoint.headers]


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


def _write(path: Path) -> float:
    """Blocks of numbers that no file system can shrink, brought to the disk."""
    block = np.random.default_rng(0).bytes(BLOCK_BYTES)
    began, written = time.perf_counter(), 0
    with path.open("wb", buffering=0) as file:
        while written < _WRITTEN_BYTES and time.perf_counter() - began < _LONGEST_S / 2:
            written += file.write(block)
        os.fsync(file.fileno())
    return written / (time.perf_counter() - began)


def _read(paths: Sequence[Path]) -> float:
    """Blocks by as many threads as an offloaded run has, none of them from the page cache."""
    files = {path: os.open(path, os.O_RDONLY) for path in paths}
    blocks = [
        (file, offset)
        for path, file in files.items()
        for offset in range(0, path.stat().st_size, BLOCK_BYTES)
    ][: _READ_BYTES // BLOCK_BYTES]
    for file, offset in blocks:
        os.posix_fadvise(file, offset, BLOCK_BYTES, os.POSIX_FADV_DONTNEED)
    buffers = [bytearray(b"x") * BLOCK_BYTES for _ in range(READERS)]  # no page is met here first
    began = time.perf_counter()

    def reader(number: int) -> int:
        total = 0
        for file, offset in blocks[number::READERS]:
            if time.perf_counter() - began < _LONGEST_S:
                total += os.preadv(file, [buffers[number]], offset)
        return total

    try:
        with ThreadPoolExecutor(READERS) as pool:
            return sum(pool.map(reader, range(READERS))) / (time.perf_counter() - began)
    finally:
        for file in files.values():
            os.close(file)


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> float:
    """Bytes/s of tensors of the checkpoint to the device and checked, from the page cache."""
    some, total = [], 0
    for tensor in checkpoint.tensors.values():
        if total + tensor.nbytes <= _LOADED_BYTES:
            some.append(tensor)
            total += tensor.nbytes
    for _ in range(2):  # once to bring the pages into the cache
        began = time.perf_counter()
        for file in {tensor.file for tensor in some}:
            with safe_open(checkpoint.path / file, framework="pt") as opened:
                for tensor in some:
                    if tensor.file == file:
                        loaded = opened.get_tensor(tensor.name).to(device, dtype, copy=True)
                        bool(torch.isfinite(loaded).all())
        seconds = time.perf_counter() - began
    return total / seconds


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
