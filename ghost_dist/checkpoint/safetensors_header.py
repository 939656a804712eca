"""The header of a safetensors file, checked against the file's size; no tensor byte is read.

Layout: 8 bytes little-endian header length N, N bytes of JSON, then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghost_dist.errors import CheckpointError

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of one element of every safetensors dtype."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes
    ----------
    name
        As in the file.
    dtype
        safetensors' name, such as ``"BF16"``.
    shape
        Empty for a scalar.
    file
        Name of the shard in the checkpoint folder.
    offset
        First byte, from the beginning of the shard.
    nbytes
        Length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


def read_header(path: Path) -> tuple[bytes, dict[str, TensorInfo]]:
    """The raw JSON header of a safetensors file, and its tensors by name.

    Raises
    ------
    CheckpointError
        If the file cannot be read, its header is damaged, or its size is not what the header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise _damaged(
                    path,
                    f"its header should be {length} bytes long, but the file has {size} bytes",
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except ValueError as error:
        raise _damaged(path, f"its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    data = _LENGTH_BYTES + length
    header.pop("__metadata__", None)
    tensors = [_tensor(path, name, entry, data) for name, entry in header.items()]
    end = data
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise _damaged(
                path, f"tensor {tensor.name} begins at byte {tensor.offset}, expected {end}"
            )
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(
            f"{path} is truncated or damaged: got {size} bytes, its header says {end}. "
            "Download or copy this file again."
        )
    return raw, {tensor.name: tensor for tensor in tensors}


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        numbers = (*shape, first, last)
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("negative or fractional number")
        bits = math.prod(shape) * DTYPE_BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the entry of tensor {name} is {entry!r}") from error
    if last - first != (bits + 7) // 8:
        raise _damaged(
            path,
            f"tensor {name} ({dtype}, shape {list(shape)}) has {last - first} bytes, expected "
            f"{(bits + 7) // 8}",
        )
    return TensorInfo(name, dtype, shape, path.name, data + first, last - first)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a sound safetensors file: {what}. Download or copy this file again."
    )
