"""How fast a machine is at what runs do: measured once (``probe.py``) and kept."""

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.weight_reader import BLOCK_BYTES, READERS
from ghost_dist.durable import fingerprint, write_json

FORMAT = 4


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second."""

    device: str
    read: float  # bytes of the checkpoint past the page cache
    read_from: str
    load: float  # bytes from the page cache to the device, checked
    write: float  # bytes brought to the disk
    # FLOP: by kind of layer, "head" with the scores, by kind of sums, by dtype of plain products
    products: Mapping[str, float]
    factors: Mapping[str, float]  # FLOP of fits, by kind of regressors
    process_s: float  # until a fresh process has imported its libraries
    measured_s: float


def cache_file(key: Mapping[str, Any]) -> Path:
    """Where rates measured under these circumstances are kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "ghost_dist" / "rates" / f"{fingerprint({'format': FORMAT, **key})[:32]}.json"


def stored_rates(key: Mapping[str, Any]) -> Rates | None:
    """Rates measured before under the same circumstances; None if there are none to be read."""
    try:
        return Rates(**json.loads(cache_file(key).read_bytes())["rates"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # measured again then


def store_rates(key: Mapping[str, Any], rates: Rates) -> None:
    """Keep rates for later plans, with the circumstances in plain text."""
    path = cache_file(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": dict(key), "rates": dataclasses.asdict(rates)})


_READ_BYTES, _WRITTEN_BYTES, _LOADED_BYTES = 2_000_000_000, 512 << 20, 256 << 20
_LONGEST_S = 2.0
_SPARSE = 0.5  # a file of which less than this is on the disk was never written


def measure_files(
    checkpoint: Checkpoint, folder: Path, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Rates of files as ``Rates`` names them; with a temporary folder below ``folder``."""
    with tempfile.TemporaryDirectory(prefix=".ghost-dist-probe-", dir=folder) as name:
        scratch = Path(name)
        write = _write(scratch / "probe.bin")
        real = _real_files(checkpoint)
        return {
            "write": write,
            "read": _read(real or [scratch / "probe.bin"]),
            "read_from": "checkpoint" if real else "a file of the run's file system",
            "load": _load(checkpoint, device, dtype),
        }


def cached_share(checkpoint: Checkpoint) -> float:
    """Share of the checkpoint whose tensors begin in the page cache; 0 where nobody can say."""
    found = 0
    with _opened(_real_files(checkpoint)) as files:
        for tensor in checkpoint.tensors.values():
            if file := files.get(checkpoint.path / tensor.file):
                with contextlib.suppress(OSError):  # where it would have to wait for the disk
                    os.preadv(file, [bytearray(1)], tensor.offset, os.RWF_NOWAIT)
                    found += tensor.nbytes
    return found / checkpoint.nbytes


def _real_files(checkpoint: Checkpoint) -> list[Path]:
    """Without sparse ones, which were never written."""
    files = [checkpoint.path / file for file in checkpoint.headers]
    return [f for f in files if f.stat().st_blocks * 512 >= _SPARSE * f.stat().st_size]


@contextlib.contextmanager
def _opened(paths: Sequence[Path]) -> Iterator[dict[Path, int]]:
    with contextlib.ExitStack() as files:
        yield {path: files.enter_context(path.open("rb", buffering=0)).fileno() for path in paths}


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
    buffers = [bytearray(b"x") * BLOCK_BYTES for _ in range(READERS)]  # no page is met here first

    def reader(number: int) -> int:
        total = 0
        for file, offset in blocks[number::READERS]:
            if time.perf_counter() - began < _LONGEST_S:
                total += os.preadv(file, [buffers[number]], offset)
        return total

    with _opened(paths) as files, ThreadPoolExecutor(READERS) as pool:
        blocks = [
            (file, offset)
            for path, file in files.items()
            for offset in range(0, path.stat().st_size, BLOCK_BYTES)
        ][: _READ_BYTES // BLOCK_BYTES]
        for file, offset in blocks:
            os.posix_fadvise(file, offset, BLOCK_BYTES, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        return sum(pool.map(reader, range(READERS))) / (time.perf_counter() - began)


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> float:
    """Bytes/s of tensors of the checkpoint to the device and checked, from the page cache."""
    some, total = defaultdict(list), 0
    for tensor in checkpoint.tensors.values():
        if total + tensor.nbytes <= _LOADED_BYTES:
            some[tensor.file].append(tensor.name)
            total += tensor.nbytes
    for _ in range(2):  # once to bring the pages into the cache
        began = time.perf_counter()
        for file, names in some.items():
            with safe_open(checkpoint.path / file, framework="pt") as opened:
                for name in names:
                    loaded = opened.get_tensor(name).to(device, dtype, copy=True)
                    bool(torch.isfinite(loaded).all())
        seconds = time.perf_counter() - began
    return total / seconds
