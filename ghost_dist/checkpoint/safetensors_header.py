"""The header of a safetensors file, which the library checks; it does not tell where bytes are.

Layout: 8 bytes little-endian header length N, N bytes of JSON, then the tensors without gaps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ghost_dist.errors import CheckpointError

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint."""

    name: str
    dtype: str  # safetensors' name, such as "BF16"
    shape: tuple[int, ...]  # empty for a scalar
    file: str  # in the checkpoint folder
    offset: int  # from the beginning of the file
    nbytes: int


def read_header(path: Path) -> tuple[bytes, dict[str, TensorInfo]]:
    """The raw JSON header of a safetensors file, and its tensors by name."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            data = _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")
            raw = file.read(min(data, size))[: data - _LENGTH_BYTES]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise _damaged(path, f"its header is not valid JSON: {error}") from error
    try:
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            (first, last), shape = entry["data_offsets"], tuple(entry["shape"])
            at = (path.name, data + first, last - first)
            tensors[name] = TensorInfo(name, entry["dtype"], shape, *at)
        end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=data)
        if size >= end:
            # Compares shapes, dtypes, gaps and the size. For torch it would be mapped for writing,
            # which a host with less memory than the file may refuse.
            with safe_open(path, framework="numpy"):
                pass
    except (AttributeError, LookupError, TypeError, ValueError, SafetensorError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if size < end:
        raise CheckpointError(
            f"{path} is truncated or damaged: got {size} bytes, its header says {end}. "
            "Download or copy this file again."
        )
    return raw, tensors


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a sound safetensors file: {what}. Download or copy this file again."
    )
