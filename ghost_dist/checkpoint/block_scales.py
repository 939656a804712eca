"""Weights in FP8 with one scale per block (DeepSeek-V3, section 3.3), read as bfloat16.

A weight ``W`` (out, in) is stored as float8_e4m3 numbers ``Q`` of its shape and scales ``S``
(ceil(out / a), ceil(in / b)), by the name of the weight with ``_scale_inv`` behind it, for blocks
of a x b numbers (128 x 128):

    W[i, j] = Q[i, j] * S[i // a, j // b]        in float32, then rounded to bfloat16

What the last blocks lack is not stored: sizes need not be multiples of a and b. Always bfloat16,
whatever the dtype of the computation, so that what is calibrated is what is exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghost_dist.checkpoint.safetensors_header import TensorInfo
from ghost_dist.errors import CheckpointError

SUFFIX = "_scale_inv"
_SCALE_DTYPES = ("F32", "BF16", "F16")
_NUMBERS_AT_ONCE = 1 << 24


def weight_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Numbers (out, in) that share a scale; None if the checkpoint is not of this kind.

    Parameters
    ----------
    config
        Content of ``config.json``.
    """
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != "fp8":
        return None
    block = found.get("weight_block_size")
    if not isinstance(block, list) or found.get("fmt", "e4m3") != "e4m3":
        return None
    if len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        return None
    return block[0], block[1]


def scales_of(
    path: Path, tensors: Mapping[str, TensorInfo], block: tuple[int, int]
) -> dict[str, TensorInfo]:
    """The scales of every FP8 weight, by name of the weight.

    Parameters
    ----------
    path
        Of the checkpoint, for messages.
    tensors
        All of its tensors.
    block
        As :func:`weight_block` gives it.

    Raises
    ------
    CheckpointError
        If a weight has no scales or scales of another shape or dtype, or scales have no weight.
    """
    found = {}
    for name, tensor in tensors.items():
        if not tensor.dtype.startswith("F8_"):
            continue
        if tensor.dtype != "F8_E4M3" or len(tensor.shape) != 2:
            raise CheckpointError(
                f"{path}: tensor {name} is {tensor.dtype} of shape {list(tensor.shape)}; of FP8 "
                "only matrices in F8_E4M3 with scales per block can be read. Give the checkpoint "
                "in bfloat16."
            )
        scale = tensors.get(name + SUFFIX)
        if scale is None:
            raise CheckpointError(
                f"{path}: tensor {name} is FP8, but its scales {name + SUFFIX} are not there. "
                "Download or copy the checkpoint again."
            )
        expected = tuple(-(-n // size) for n, size in zip(tensor.shape, block, strict=True))
        if scale.shape != expected or scale.dtype not in _SCALE_DTYPES:
            raise CheckpointError(
                f"{path}: {scale.name} is {scale.dtype} of shape {list(scale.shape)}, expected "
                f"one of {', '.join(_SCALE_DTYPES)} of shape {list(expected)}: one number per "
                f"{block[0]} x {block[1]} of {list(tensor.shape)}. config.json "
                "(quantization_config.weight_block_size) and the files disagree; download them "
                "again."
            )
        found[name] = scale
    lone = sorted(
        name for name in tensors if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) not in found
    )
    if lone:
        raise CheckpointError(
            f"{path}: {lone[0]} are scales of a tensor that is not FP8 or not there. Download or "
            "copy the checkpoint again."
        )
    return found


def dequantised(stored_OI: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The weight as bfloat16, on the same device.

    Parameters
    ----------
    stored_OI
        float8_e4m3fn, shape (out, in).
    scales
        Floats, shape (ceil(out / a), ceil(in / b)).
    block
        (a, b).
    """
    rows, columns = stored_OI.shape
    high, wide = block
    scale_of_column = torch.arange(columns, device=stored_OI.device) // wide
    weight_OI = torch.empty(rows, columns, dtype=torch.bfloat16, device=stored_OI.device)
    step = high * max(1, _NUMBERS_AT_ONCE // max(1, high * columns))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        scale_of_row = torch.arange(first, last, device=stored_OI.device) // high
        part = stored_OI[first:last].float()
        part *= scales.float()[:, scale_of_column][scale_of_row]
        weight_OI[first:last] = part
    return weight_OI
