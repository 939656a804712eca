"""Filling a sharded model from safetensors: each rank reads its own slices and nothing else.

transformers renames and merges what the files hold (experts stored one by one, tensors that were
called otherwise), but is handed tensors that give the rank's slice when they are read. So the
conversions are the family's own and no full tensor exists that is not replicated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from ghost_dist.checkpoint.conversions import convert_and_load, quiet_loading, renamed
from ghost_dist.checkpoint.load import check_finite
from ghost_dist.checkpoint.reader import Checkpoint, lazy_tensors
from ghost_dist.engines.sharding import Shard, Sharding
from ghost_dist.errors import UnsupportedArchitectureError

_SLICE_WISE = {"MergeModulelist", "Concatenate"}
"""Conversions that give the rank's slice of the result when they get that slice of every source."""


class _SlicedTensor:
    """A tensor that gives the rank's part when read; ``copied``, so that no mapped file is kept."""

    def __init__(self, source: Any, shard: Shard | None, copied: bool) -> None:
        self._source, self._shard, self._copied = source, shard, copied
        self.nbytes = 0

    def __getitem__(self, _: EllipsisType) -> Tensor:
        if self._shard is None:
            tensor: Tensor = self._source[:]
        else:
            before = (slice(None),) * self._shard.dim
            parts = [self._source[(*before, slice(*piece))] for piece in self._shard.pieces]
            if len(parts) > 1:
                tensor = torch.cat(parts, self._shard.dim)
            else:
                tensor = parts[0]
        if self._copied:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self.nbytes = tensor.numel() * tensor.element_size()
        return tensor


def load_shards(
    model: Any,
    checkpoint: Checkpoint,
    sharding: Sharding,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Read this rank's part of every parameter of ``model``; returns the bytes read.

    The model is a base model on the meta device in its local shapes; ``shapes`` are the full ones.
    What the family keeps in float32 stays so.
    """
    with contextlib.ExitStack() as files:
        on_cpu = device.type == "cpu"
        found, merged = _find_tensors(model, checkpoint, sharding, shapes, files, copied=on_cpu)
        with quiet_loading():
            convert_and_load(model, checkpoint, found, dtype, device, one_by_one=on_cpu or merged)
    check_finite(checkpoint.path, model, dtype)
    sharding.add_once(model)
    return sum(tensor.nbytes for tensor in found.values())


def _find_tensors(
    model: Any,
    checkpoint: Checkpoint,
    sharding: Sharding,
    shapes: Mapping[str, tuple[int, ...]],
    files: contextlib.ExitStack,
    *,
    copied: bool,
) -> tuple[dict[str, _SlicedTensor], bool]:
    """Tensors of the files that the model needs, and whether any of them are merged."""
    found: dict[str, _SlicedTensor] = {}
    merged = False
    needed = renamed(model, checkpoint)
    sources = lazy_tensors(checkpoint, needed, files)
    for key, place in needed.items():
        target, pattern = place.target, place.pattern
        info = checkpoint.tensors[key]
        merged = merged or pattern is not None
        shard = sharding.shards.get(target)
        if pattern is not None and shard is not None:
            shard = _source_shard(
                model, target, pattern, place.converter, shard, shapes[target], info
            )
        # One in FP8 is whole for a moment, since the rank's slice may begin within a block.
        found[key] = _SlicedTensor(sources[key], shard, copied)
    return found, merged


def _source_shard(
    model: Any,
    target: str,
    pattern: str,
    converter: Any,
    shard: Shard,
    full: tuple[int, ...],
    info: Any,
) -> Shard:
    """The slice of one expert's tensor that ends in this rank's slice of the fused parameter."""
    sources = converter.source_patterns
    operations = {type(operation).__name__ for operation in converter.operations}
    dim = shard.dim - 1  # merging puts the experts' dimension before the tensor's own
    one = full[shard.dim] // len(sources)
    if (
        not operations <= _SLICE_WISE
        or "MergeModulelist" not in operations
        or len(shard.pieces) != len(sources)
        or len(info.shape) != len(full) - 1
        or info.shape[dim] != one
    ):
        raise UnsupportedArchitectureError(
            f"Family {model.config.model_type} cannot be sharded by DeepSpeed: transformers makes "
            f"{target} of {len(sources)} tensors {pattern} by {', '.join(sorted(operations))}, "
            "which cannot be done slice by slice. Set engine.backend=transformers."
        )
    number = sources.index(pattern)
    start, stop = shard.pieces[number]
    return Shard(dim, ((start - number * one, stop - number * one),))
