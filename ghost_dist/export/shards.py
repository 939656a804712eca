"""Safetensors shards from byte ranges of other files: copied, not decoded.

Memory of a shard is one copy buffer, or one operator, whatever the size of the model.
"""

import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from ghost_dist.checkpoint.reader import DTYPES, FLOATS, Checkpoint
from ghost_dist.errors import ExportError
from ghost_dist.progress import Advance

_BUFFER_BYTES = 8 << 20
_ALIGNMENT = 8
_NOT_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


New = Literal["no", "values", "yes"]  # yes: the model has no such tensor; values: it has others


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write, as the new header says it; equal to others of which it says the same."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    nbytes: int
    # File and first byte, or what gives the values.
    source: tuple[Path, int] | Callable[[], Tensor] = field(compare=False)
    new: New = field(default="no", compare=False)

    @staticmethod
    def copied(source: Checkpoint, name: str, new_name: str) -> "NewTensor":
        """A tensor of a checkpoint, as it stands there."""
        old = source.tensors[name]
        place = (source.path / old.file, old.offset)
        return NewTensor(new_name, old.dtype, old.shape, old.nbytes, place)

    @staticmethod
    def of(value: Tensor, name: str, new: New = "no") -> "NewTensor":
        """One that is at hand, on the CPU."""
        dtype = next(name for name, known in FLOATS.items() if known == value.dtype)
        return NewTensor(name, dtype, tuple(value.shape), value.nbytes, lambda: value, new)


def plan_shards(
    tensors: Sequence[NewTensor], max_shard_bytes: int
) -> dict[str, tuple[NewTensor, ...]]:
    """Deal tensors, in order, to files of so many bytes, or of one tensor; transformers' names.

    New ones come last, in files of their own, so that the others are the same whatever is new.
    """
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        apart = len(shards) > 1 and tensor.new == "yes" != shards[-1][0].new
        if shards[-1] and (apart or filled + tensor.nbytes > max_shard_bytes):
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": tuple(shards[0])}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": tuple(shard)
        for number, shard in enumerate(shards, start=1)
    }


def write_shard(path: Path, tensors: Sequence[NewTensor], advance: Advance) -> None:
    """Write one safetensors file; ``advance`` is called with the bytes just written."""
    tensors = _in_order(tensors)
    with path.open("xb") as target:
        target.write(_header(tensors))
        for tensor in tensors:
            if callable(tensor.source):
                content = _bytes(tensor.source())
                assert len(content) == tensor.nbytes, "the header is already written"
                target.write(content)
                advance(tensor.nbytes)
            else:
                _copy(target, *tensor.source, tensor.nbytes, advance)


def put_values(path: Path, tensors: Sequence[NewTensor]) -> None:
    """Write what is new into a file that was written for these tensors with the model's values."""
    tensors = _in_order(tensors)
    offset = len(_header(tensors))
    with path.open("r+b") as target:
        for tensor in tensors:
            if tensor.new == "values":
                assert callable(tensor.source), "it is in no file"
                target.seek(offset)
                target.write(_bytes(tensor.source()))
            offset += tensor.nbytes


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().view(torch.uint8).numpy().tobytes()


def _in_order(tensors: Sequence[NewTensor]) -> list[NewTensor]:
    """As they stand in a file: wide numbers first, which keeps all aligned."""
    return sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)


def _header(tensors: Sequence[NewTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        entry = {"dtype": tensor.dtype, "shape": tensor.shape}
        entries[tensor.name] = {**entry, "data_offsets": [end, end := end + tensor.nbytes]}
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def _copy(target: BinaryIO, file: Path, offset: int, nbytes: int, advance: Advance) -> None:
    """Copy a byte range, inside the kernel where the file systems can (some share the blocks)."""
    target.flush()
    in_kernel = hasattr(os, "copy_file_range")
    end = offset + nbytes
    with file.open("rb", buffering=0) as source:
        while offset < end:
            wanted = min(_BUFFER_BYTES, end - offset)
            try:
                if in_kernel:
                    copied = os.copy_file_range(source.fileno(), target.fileno(), wanted, offset)
                else:
                    copied = os.write(target.fileno(), os.pread(source.fileno(), wanted, offset))
            except OSError as error:
                if not in_kernel or error.errno not in _NOT_IN_KERNEL:
                    raise
                in_kernel = False
                continue
            if copied == 0:
                raise ExportError(
                    f"{file} ended at byte {offset}, expected {end}: the source checkpoint changed "
                    "during the export. Check it and export again."
                )
            offset += copied
            advance(copied)
