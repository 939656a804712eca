"""Tensors as safetensors files hold them: the header, and weights in FP8, read as bfloat16.

The library checks a header, but does not tell where bytes are. Layout: 8 bytes little-endian header
length N, N bytes of JSON, then the tensors without gaps.

A weight ``W`` (out, in) is stored as float8_e4m3 numbers ``Q`` of its shape and scales ``S``, by
the name of the weight with ``_scale_inv`` or ``_scale`` behind it, for blocks of a x b numbers:

    W[i, j] = Q[i, j] * S[i // a, j // b]        in float32, then rounded to bfloat16

A block is what ``quantization_config.weight_block_size`` says (128 x 128 in DeepSeek-V3, section
3.3), the whole matrix (one scale), or a row (``out`` scales); the last ones may be incomplete.
Always bfloat16, whatever the dtype of the computation: what is calibrated is what is exported.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ghost_dist.errors import CheckpointError

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
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


SUFFIXES = ("_scale_inv", "_scale")
_SCALE_DTYPES = ("F32", "BF16", "F16")
_OF_ACTIVATIONS = re.compile(r"\.(input|activation|output|q|k|v)_scale$")
_NUMBERS_AT_ONCE = {"cpu": 1 << 20}  # 4 MiB in float32, which a cache holds
_MOST_AT_ONCE = 1 << 24  # elsewhere


@dataclass(frozen=True)
class Scales:
    info: TensorInfo
    block: tuple[int, int]  # numbers (out, in) that share a scale


def weight_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Numbers (out, in) that share a scale, if the configuration says so and it is of FP8."""
    match config.get("quantization_config"):
        case {"quant_method": "fp8", "weight_block_size": [int(high), int(wide)], **others}:
            if min(high, wide) > 0 and others.get("fmt", "e4m3") == "e4m3":
                return high, wide
    return None


def scales_of(
    path: Path, tensors: Mapping[str, TensorInfo], block: tuple[int, int] | None
) -> dict[str, Scales]:
    found = {}
    for name, tensor in tensors.items():
        if not tensor.dtype.startswith("F8_") or name.endswith(SUFFIXES):
            continue
        where = f"{path / tensor.file}: tensor {name}"
        if tensor.dtype != "F8_E4M3" or len(tensor.shape) != 2:
            raise CheckpointError(
                f"{where} is {tensor.dtype} of shape {list(tensor.shape)}; of FP8 only matrices in "
                "F8_E4M3 with scales can be read. Give the checkpoint in bfloat16."
            )
        scale = next((tensors[name + end] for end in SUFFIXES if name + end in tensors), None)
        if scale is None:
            raise CheckpointError(
                f"{where} is FP8, but its scales ({name + SUFFIXES[0]} or {name + SUFFIXES[1]}) "
                "are not there. Download or copy the checkpoint again."
            )
        found[name] = Scales(scale, _block_of(path, tensor, scale, block))
    weights = {name + end: name for name in found for end in SUFFIXES}
    lone = sorted(name for name in tensors if name.endswith("_scale_inv") and name not in weights)
    if lone:
        raise CheckpointError(
            f"{path}: {lone[0]} are scales of a tensor that is not FP8 or not there. Download or "
            "copy the checkpoint again."
        )
    return found


def of_activations(name: str) -> bool:
    """Whether a tensor of a checkpoint in FP8 scales activations, which are not quantised here."""
    return _OF_ACTIVATIONS.search(name) is not None


def _block_of(
    path: Path, tensor: TensorInfo, scale: TensorInfo, block: tuple[int, int] | None
) -> tuple[int, int]:
    rows, columns = tensor.shape
    in_blocks = None
    if block is not None:
        in_blocks = tuple(-(-n // size) for n, size in zip(tensor.shape, block, strict=True))
    if scale.dtype in _SCALE_DTYPES:
        if block is not None and scale.shape == in_blocks:
            return block
        if block is None and math.prod(scale.shape) == 1:
            return rows, columns
        if block is None and scale.shape in ((rows,), (rows, 1)):
            return 1, columns
    shapes = "[], [1], [out] or [out, 1]" if in_blocks is None else str(list(in_blocks))
    what = "tensor or row" if block is None else f"{block[0]} x {block[1]}"
    raise CheckpointError(
        f"{path / scale.file}: {scale.name} is {scale.dtype} of shape {list(scale.shape)}, "
        f"expected one of {', '.join(_SCALE_DTYPES)} of shape {shapes}: one number per {what} of "
        f"{list(tensor.shape)}. config.json (quantization_config.weight_block_size) and the files "
        "disagree; download them again."
    )


def dequantised(stored_OI: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The weight (out, in) as bfloat16, on the same device, of its float8_e4m3fn and scales."""
    rows, columns = stored_OI.shape
    high, wide = block
    scales = scales.float().reshape(-(-rows // high), -(-columns // wide))
    scales_BI = scales.repeat_interleave(wide, 1)[:, :columns]  # B: blocks of rows
    weight_OI = torch.empty(rows, columns, dtype=torch.bfloat16, device=stored_OI.device)
    at_once = _NUMBERS_AT_ONCE.get(stored_OI.device.type, _MOST_AT_ONCE)
    step = high * max(1, at_once // max(1, high * columns))
    whole = rows // high * high
    for first in range(0, whole, step):
        last = min(first + step, whole)
        part_BHI = stored_OI[first:last].float().view(-1, high, columns)
        part_BHI *= scales_BI[first // high : last // high, None]
        weight_OI[first:last] = part_BHI.view(-1, columns)
    if whole < rows:
        weight_OI[whole:] = stored_OI[whole:].float() * scales_BI[-1]
    return weight_OI
