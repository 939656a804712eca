"""Which part of each tensor a rank holds and reads, and the modules that AutoTP leaves whole.

Everything here acts on a model on the meta device, before DeepSpeed sees it. What a family needs is
found by what its modules are, not by its name; that the result computes the same is proved by
``conformance.py`` each time.

Each rank reads its own slices and nothing else. transformers renames and merges what the files
hold, but is handed tensors that give the rank's slice when they are read.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ghost_dist.checkpoint.conversions import Place, convert_and_load, renamed
from ghost_dist.checkpoint.load import check_finite
from ghost_dist.checkpoint.reader import Checkpoint, lazy_tensors
from ghost_dist.checkpoint.tensor_files import TensorInfo
from ghost_dist.errors import ConfigError, UnsupportedArchitectureError

Piece = tuple[int, int]

GATES = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class Shard:
    """The part of a full tensor that this rank holds."""

    dim: int  # that is split
    pieces: tuple[Piece, ...]  # along it, half open, joined in this order; several of a fused layer


@dataclass
class Sharding:
    """How the parameters of one model are split; those that are not named are replicated."""

    rank: int
    degree: int
    shards: dict[str, Shard]  # by parameter name
    on_first_rank: list[str]  # what every rank would add: zero on all ranks but the first

    def even_piece(self, size: int) -> Piece:
        """This rank's range of ``size`` items; the first ranks get one more if it is not even."""
        base, rest = divmod(size, self.degree)
        start = self.rank * base + min(self.rank, rest)
        return start, start + base + (self.rank < rest)

    def split(self, module: nn.Module, path: str, name: str, shard: Shard) -> None:
        """Let a parameter on the meta device have the shape of this rank's part of it."""
        full = module._parameters[name]
        assert full is not None, f"{path} has no {name}"
        assert full.is_meta, f"{path}.{name} has storage already"
        shape = list(full.shape)
        shape[shard.dim] = sum(stop - start for start, stop in shard.pieces)
        module._parameters[name] = nn.Parameter(full.new_empty(shape), requires_grad=False)
        self.shards[f"{path}.{name}"] = shard

    def add_once(self, model: nn.Module) -> None:
        with torch.no_grad():
            for name in self.on_first_rank if self.rank > 0 else ():
                model.get_parameter(name).zero_()


def shard_experts(model: nn.Module, sharding: Sharding) -> None:
    """Split the inner width of fused experts over the ranks, and sum what the ranks compute.

    Layouts: gate_up (E, 2I, C) or, transposed, (E, C, 2I), the halves one after the other or
    interleaved; down (E, C, I) or (E, I, C); biases (E, 2I) and (E, C). Experts in another layout
    stay replicated, which is right but saves no memory.
    """
    for path, module in model.named_modules():
        down = module._parameters.get("down_proj")
        if down is None or down.ndim != 3 or not hasattr(module, "is_transposed"):
            continue  # transformers marks its layouts
        up = "gate_up_proj" if module.has_gate else "up_proj"
        if module._parameters.get(up) is None:
            continue
        up_dim, down_dim = (2, 1) if module.is_transposed else (1, 2)
        inner = down.shape[down_dim]
        start, stop = sharding.even_piece(inner)
        if not module.has_gate:
            pieces: tuple[Piece, ...] = ((start, stop),)
        elif module.is_concatenated:
            pieces = ((start, stop), (inner + start, inner + stop))
        else:
            pieces = ((2 * start, 2 * stop),)
        sharding.split(module, path, up, Shard(up_dim, pieces))
        sharding.split(module, path, "down_proj", Shard(down_dim, ((start, stop),)))
        if module.has_bias:
            sharding.split(module, path, f"{up}_bias", Shard(1, pieces))
            sharding.on_first_rank.append(f"{path}.down_proj_bias")
        module.register_forward_hook(_sum_over_ranks)


def _sum_over_ranks(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
    output = output.contiguous()
    dist.all_reduce(output)
    return output


def shard_wide_norms(model: nn.Module, sharding: Sharding) -> None:
    """Split RMSNorms over the whole query or key width (OLMo 2), which need all ranks' squares."""
    for path, module in list(model.named_modules()):
        for projection, norm in (("q_proj", "q_norm"), ("k_proj", "k_norm")):
            linear, whole = getattr(module, projection, None), getattr(module, norm, None)
            if not isinstance(linear, nn.Linear) or not isinstance(whole, nn.Module):
                continue
            weight = whole._parameters.get("weight")
            if weight is None or tuple(weight.shape) != (linear.out_features,):
                continue  # one norm per head: the heads of a rank have all they need
            epsilon: Any = getattr(whole, "variance_epsilon", None) or whole.eps
            narrow = _WideRMSNorm(weight, epsilon, linear.out_features)
            piece = sharding.even_piece(linear.out_features)
            sharding.split(narrow, f"{path}.{norm}", "weight", Shard(0, (piece,)))
            setattr(module, norm, narrow)


class _WideRMSNorm(nn.Module):
    def __init__(self, weight: nn.Parameter, epsilon: float, width: int) -> None:
        super().__init__()
        self.weight, self.epsilon, self.width = weight, epsilon, width

    def forward(self, x_BTN: Tensor) -> Tensor:
        wide_BTN = x_BTN.float()
        squares_BT1 = wide_BTN.square().sum(-1, keepdim=True)
        dist.all_reduce(squares_BT1)
        rms_BT1 = torch.rsqrt(squares_BT1 / self.width + self.epsilon)
        return (self.weight * (wide_BTN * rms_BT1)).to(x_BTN.dtype)


def shard_sinks(model: nn.Module, sharding: Sharding) -> None:
    """Give each rank the attention sinks (one number per head) of its own heads (GPT-OSS)."""
    for path, module in model.named_modules():
        sinks = module._parameters.get("sinks")
        if sinks is not None and sinks.ndim == 1:
            piece = sharding.even_piece(sinks.shape[0])
            sharding.split(module, path, "sinks", Shard(0, (piece,)))


def narrow_fused_attention(module: Any, degree: int) -> None:
    """Let a split fused attention know its own number of heads, by its own config (Phi 3)."""
    config = copy.copy(module.config)
    config.num_attention_heads //= degree
    config.num_key_value_heads //= degree
    module.config = config


@contextlib.contextmanager
def kept_whole(layers: nn.ModuleList) -> Iterator[None]:
    """Take out of the layers, for a while, what AutoTP would split though it must stay replicated.

    State-space mixers: their fused input projection feeds a convolution and a scan over all
    channels. Routers and gates of experts: every rank needs all of their few outputs.
    """
    aside: list[tuple[nn.Module, str, nn.Module]] = []
    for layer in layers:
        for name, child in list(layer.named_children()):
            if any(isinstance(module, nn.Conv1d) for module in child.modules()):
                aside.append((layer, name, child))
        for parent in layer.modules():
            for name, child in parent.named_children():
                if name in GATES and isinstance(child, nn.Linear):
                    aside.append((parent, name, child))
    with contextlib.ExitStack() as stack:
        for parent, name, child in aside:
            stack.callback(setattr, parent, name, child)
            setattr(parent, name, nn.Identity())
        yield


def gather_width(local: Tensor, width: int) -> Tensor:
    """Join the columns (..., n) of ranks that share them, in order, to (..., width); collective."""
    if local.shape[-1] == width:
        return local
    # Ranks may differ by one column, and gather takes equal shapes only.
    own = torch.tensor([local.shape[-1]], device=local.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    widths = [int(count) for count in counts]
    assert sum(widths) == width, f"the ranks hold {widths} columns of {width}"
    padded = nn.functional.pad(local, (0, max(widths) - local.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(parts, padded)
    return torch.cat([part[..., :n] for part, n in zip(parts, widths, strict=True)], -1)


def check_degree(config: Any, degree: int) -> None:
    """Raise ConfigError if the heads of a model cannot be dealt out evenly over the ranks."""
    try:
        heads = getattr(config, "num_attention_heads", None)
    except RuntimeError:  # transformers: every layer has a number of its own
        heads = None
    if heads is None:
        raise ConfigError(
            f"engine.tensor_parallel={degree} deals out attention heads, and family "
            f"{config.model_type} has none, or not the same number in all layers. Leave it at 1."
        )
    groups = getattr(config, "num_key_value_heads", None) or heads
    for count, name in ((heads, "attention heads"), (groups, "key-value heads")):
        if count % degree:
            fit = [n for n in range(1, min(heads, groups) + 1) if heads % n == groups % n == 0]
            raise ConfigError(
                f"engine.tensor_parallel={degree} does not divide the {count} {name} of the "
                f"model: needed a divisor of {heads} heads and {groups} key-value heads, found "
                f"{degree}. Choose one of {', '.join(map(str, fit))}."
            )


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
        sources = lazy_tensors(checkpoint, needed, files, device)
        for key, place in needed.items():
            shard = sharding.shards.get(place.target)
            if place.pattern is not None and shard is not None:
                shape, info = shapes[place.target], checkpoint.tensors[key]
                shard = _source_shard(model.config.model_type, place, shard, shape, info)
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
            "which cannot be done slice by slice. Set engine.tensor_parallel=1."
        )
    number = sources.index(place.pattern)
    start, stop = shard.pieces[number]
    return Shard(dim, ((start - number * one, stop - number * one),))
