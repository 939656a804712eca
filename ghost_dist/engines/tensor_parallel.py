"""One replica of a model over several devices: a torch.distributed world shares every layer.

DeepSpeed's AutoTP (``deepspeed.init_inference``) splits the linear layers; ``sharding.py`` splits
what it leaves whole and reads each rank's slices.

Every rank is given the same windows and pushes the same streams, so a sink may keep any part of
the sums on each rank. All ranks of the world must call ``run`` alike: its sums are collective.
"""

import contextlib
import importlib.util
import io
import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers.pytorch_utils import Conv1D

from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.conversions import environment
from ghost_dist.checkpoint.load import truncated_config
from ghost_dist.checkpoint.peers import errors_shared
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.twin import restore_buffers, shapes_only
from ghost_dist.devices import begin, numbered
from ghost_dist.engines.conformance import check_conformance
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.engines.resident import ResidentEngine, check_stream, end_at_boundary
from ghost_dist.engines.sharding import (
    Shard,
    Sharding,
    check_degree,
    kept_whole,
    load_shards,
    narrow_fused_attention,
    shard_experts,
    shard_sinks,
    shard_wide_norms,
)
from ghost_dist.errors import ConfigError, UnsupportedArchitectureError


def open_tensor_parallel(
    path: Path,
    architecture: Architecture,
    *,
    num_layers: int,
    dtype: torch.dtype,
    device: torch.device,
    degree: int,
    batch: int,
) -> ResidentEngine:
    """Share layers ``0 .. num_layers - 1`` of a checkpoint over the torch.distributed world.

    Collective: first a small random model of the family is run sharded and unsharded; then each
    rank reads its own part of the folder. What cannot be done is the same error on every rank.
    """
    world = dist.get_world_size() if dist.is_initialized() else 0
    if world != degree:
        raise ConfigError(
            f"engine.tensor_parallel={degree} needs a torch.distributed world of {degree} "
            f"processes of its own, found {world or 'none that is initialised'}. Start {degree} "
            "ranks per replica."
        )
    begin(device)  # collectives of Python objects go through the current device
    with errors_shared():
        checkpoint = open_checkpoint(path)
        check_degree(truncated_config(checkpoint, architecture, num_layers), degree)
        _prepare_deepspeed(device)
    load = partial(_load, device=device, batch=batch)
    difference = check_conformance(
        checkpoint,
        architecture,
        lambda folder, small: load(folder, small, small.num_layers, torch.float32),
        device,
        degree,
        what=f"sharded over {degree} ranks by deepspeed",
        advice="Set engine.tensor_parallel=1.",
    )
    engine = load(path, architecture, num_layers, dtype)
    engine.conformance = difference
    return engine


def _load(
    path: Path,
    architecture: Architecture,
    num_layers: int,
    dtype: torch.dtype,
    *,
    device: torch.device,
    batch: int,
) -> ResidentEngine:
    checkpoint, degree = open_checkpoint(path), dist.get_world_size()
    config = truncated_config(checkpoint, architecture, num_layers)
    model = shapes_only(architecture.base_class, config, dtype)
    end_at_boundary(model, architecture, num_layers)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    layers = model.get_submodule(architecture.of_base.layers)
    sharding = Sharding(dist.get_rank(), degree, {}, [])
    if degree > 1:
        for name, module in model.named_modules():
            if isinstance(module, Conv1D):
                raise UnsupportedArchitectureError(
                    f"Family {architecture.model_type} cannot be sharded by DeepSpeed: {name} "
                    "keeps its weight transposed (Conv1D), which AutoTP splits wrongly. Set "
                    "engine.tensor_parallel=1."
                )
        shard_experts(model, sharding)
        shard_wide_norms(model, sharding)
        shard_sinks(model, sharding)
    with kept_whole(layers):
        _shard_linear_layers(model, layers, dtype, device)
    if degree > 1:
        _note_linear_shards(model, architecture, sharding)
    # AutoTP allocated the shards: back to shapes only, so that one parameter after the other takes
    # its place as it is read.
    model.to("meta")
    restore_buffers(model, buffers, device)
    with errors_shared():
        read_bytes = load_shards(model, checkpoint, sharding, shapes, dtype, device)
    decoder = LayerwiseModel(model.requires_grad_(False).eval(), architecture.of_base)
    check_stream(decoder)
    engine = ResidentEngine(decoder, batch)
    engine.read_bytes = read_bytes
    engine.parameter_bytes = sum(p.nbytes for p in model.parameters())
    return engine


def _prepare_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed for this kind of device, and keep it from its own shared-memory sums.

    That CPU operator is compiled at run time, ignores the process group, and spins for ever once
    a peer has died.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "Tensor parallelism needs the package deepspeed, which is not installed. In the "
            "checkout: pip install -e '.[cluster]'."
        )
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # read once, when it is first imported
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__

    if get_accelerator().device_name() != device.type:
        raise ConfigError(
            f"DeepSpeed runs on {get_accelerator().device_name()} in this process, engine.device "
            f"is {device}. Set DS_ACCELERATOR={device.type} in the environment of the process."
        )
    __compatible_ops__["deepspeed_shm_comm"] = False
    with _without_chatter(), _local_rank(device):
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")


def _shard_linear_layers(
    model: nn.Module, layers: nn.ModuleList, dtype: torch.dtype, device: torch.device
) -> None:
    """AutoTP, in place, over the whole world."""
    import deepspeed
    from deepspeed.inference.engine import InferenceEngine

    # By itself AutoTP looks at the first layer only, which in a hybrid model has no attention.
    degree = dist.get_world_size()
    summed = _summed_layers(layers) if degree > 1 else {}
    with _without_chatter(), _local_rank(device):
        # Without it a group of the ranks 0 .. degree - 1 is made once per process, which outlives
        # the world it was made in.
        InferenceEngine.inference_mp_group = dist.group.WORLD
        deepspeed.init_inference(
            model,
            tensor_parallel={"tp_size": degree, "tp_grain_size": 1},
            injection_policy=summed,
            dtype=dtype,
            replace_with_kernel_inject=False,
        )


def _summed_layers(layers: nn.ModuleList) -> dict[type[nn.Module], tuple[str, ...]]:
    """By class of decoder layer, what AutoTP takes for row-parallel, over layers of every kind."""
    from deepspeed.module_inject.auto_tp import AutoTP

    kinds = {
        tuple(path for path, inner in layer.named_modules() if isinstance(inner, nn.Linear)): layer
        for layer in layers
    }
    summed: dict[type[nn.Module], set[str]] = {}
    for layer in kinds.values():
        for layer_class, names in AutoTP.tp_parser(_OneLayerModel(layer)):
            summed.setdefault(layer_class, set()).update(names)
    return {layer_class: tuple(sorted(names)) for layer_class, names in summed.items()}


class _OneLayerModel(nn.Module):
    """A model as AutoTP wants to see one: it looks for the word in the class name, and a list."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer])


def _note_linear_shards(model: nn.Module, architecture: Architecture, sharding: Sharding) -> None:
    """Write down how AutoTP split each layer; it has no public way to ask."""
    from deepspeed.module_inject.layers import (
        LinearAllreduce,
        SubParamColumnParallel,
        TensorParallel_Layer,
        fused_LinearLayer,
    )

    rank = sharding.rank
    for path, module in model.named_modules():
        if not isinstance(module, TensorParallel_Layer):
            continue
        if isinstance(module, SubParamColumnParallel):
            sizes, widths = module._subparam_sizes, module._subparam_shard_widths
            if sizes is None:
                raise UnsupportedArchitectureError(
                    f"Family {architecture.model_type} cannot be sharded by DeepSpeed: the fused "
                    f"projection {path} is interleaved. Set "
                    "engine.tensor_parallel=1."
                )
        else:
            sizes, widths = (sum(module._partition_sizes),), (module._partition_sizes,)
        if any(0 in width for width in widths):
            # Ranks with nothing stop at other places than the rest, which would wait for them.
            raise UnsupportedArchitectureError(
                f"Family {architecture.model_type} cannot be sharded by DeepSpeed: {path}, of size "
                f"{sum(sizes)}, leaves some of {sharding.degree} ranks without a part. Set "
                "a smaller engine.tensor_parallel."
            )
        pieces, offset = [], 0
        for size, width in zip(sizes, widths, strict=True):
            start = offset + sum(width[:rank])
            pieces.append((start, start + width[rank]))
            offset += size
        by_row = isinstance(module, LinearAllreduce)
        sharding.shards[f"{path}.weight"] = Shard(1 if by_row else 0, tuple(pieces))
        if module.bias is not None and not by_row:
            sharding.shards[f"{path}.bias"] = Shard(0, tuple(pieces))
        if isinstance(module, fused_LinearLayer) and len(pieces) > 1:
            parent = path.rpartition(".")[0]
            narrow_fused_attention(model.get_submodule(parent), sharding.degree)


@contextlib.contextmanager
def _local_rank(device: torch.device) -> Iterator[None]:
    """DeepSpeed chooses the GPU by LOCAL_RANK; here the device was chosen already."""
    number = os.environ.get("LOCAL_RANK", "0")
    if device.type == "cuda":
        begin(device)
        number = str(numbered(device).index)
    with environment("LOCAL_RANK", number):
        yield


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    logger = logging.getLogger("DeepSpeed")
    with contextlib.ExitStack() as stack:
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.WARNING)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield
