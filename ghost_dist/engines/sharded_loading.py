"""Filling a sharded model from safetensors: each rank reads its own slices and nothing else.

transformers renames and merges what the files hold (experts stored one by one, tensors that were
called otherwise), but is handed tensors that give the rank's slice when they are read. So the
conversions are the family's own and no full tensor exists that is not replicated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from ghost_dist.checkpoint.conversions import Place, convert_and_load, renamed
from ghost_dist.checkpoint.load import check_finite
from ghost_dist.checkpoint.reader import Checkpoint, lazy_tensors
from ghost_dist.checkpoint.safetensors_header import TensorInfo
from ghost_dist.engines.sharding import Shard, Sharding
from ghost_dist.errors import UnsupportedArchitectureError

_SLICE_WISE = {"MergeModulelist", "Concatenate"}
"""Conversions that give the rank's slice of the result when they get that slice of every source."""


@dataclass
class _SlicedTensor:
    """A tensor that gives the rank's part when read; ``copied``, so that no mapped file is kept."""

    source: Any
    shard: Shard | None
    copied: bool
    nbytes: int = 0

    def __getitem__(self, _: EllipsisType) -> Tensor:
        if self.shard is None:
            tensor: Tensor = self.source[:]
        else:
            before = (slice(None),) * self.shard.dim
            parts = [self.source[(*before, slice(*piece))] for piece in self.shard.pieces]
            tensor = torch.cat(parts, self.shard.dim) if len(parts) > 1 else parts[0]
        if self.copied:
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
    on_cpu, needed = device.type == "cpu", renamed(model, checkpoint)
    merged = any(place.pattern is not None for place in needed.values())
    found: dict[str, _SlicedTensor] = {}
    with contextlib.ExitStack() as files:
        sources = lazy_tensors(checkpoint, needed, files)
        for key, place in needed.items():
            shard = sharding.shards.get(place.target)
            if place.pattern is not None and shard is not None:
                shape, info = shapes[place.target], checkpoint.tensors[key]
                shard = _source_shard(model.config.model_type, place, shard, shape, info)
            # One in FP8 is whole for a moment, since the rank's slice may begin within a block.
            found[key] = _SlicedTensor(sources[key], shard, on_cpu)
        convert_and_load(model, checkpoint, found, dtype, device, one_by_one=on_cpu or merged)
    check_finite(checkpoint.path, model, dtype)
    sharding.add_once(model)
    return sum(tensor.nbytes for tensor in found.values())


def _source_shard(
    family: str, place: Place, shard: Shard, full: tuple[int, ...], info: TensorInfo
) -> Shard:
    """The slice of one expert's tensor that ends in this rank's slice of the fused parameter."""
    sources = place.converter.source_patterns
    operations = {type(operation).__name__ for operation in place.converter.operations}
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
            f"Family {family} cannot be sharded by DeepSpeed: transformers makes {place.target} of "
            f"{len(sources)} tensors {place.pattern} by {', '.join(sorted(operations))}, "
            "which cannot be done slice by slice. Set engine.backend=transformers."
        )
    number = sources.index(place.pattern)
    start, stop = shard.pieces[number]
    return Shard(dim, ((start - number * one, stop - number * one),))
