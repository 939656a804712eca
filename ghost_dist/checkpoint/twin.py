"""A model without storage, built from a cut configuration, says what every module should hold.

The family's own code makes it, on the meta device. A kept layer must be the same there as in the
uncut model in everything but its number: same modules, same shapes, same settings.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghost_dist.amounts import shown
from ghost_dist.spans import Span, kept_layers

_PLAIN = (bool, int, float, str, type(None))
_FILL = (1 << 20) - 3  # a length that no matrix's rows divide: rows stay different


def empty_model(model_class: type[Any], config: Any) -> Any:
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        return model_class(config).eval()


def shapes_only(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model in evaluation mode without storage; its buffers, in no file, are real, on the CPU."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = model_class._from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def random_model(model_class: Any, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with small random numbers as weights, to time what one of its shapes does."""
    model = shapes_only(model_class, config, dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = random_tensor(parameter.shape, dtype, device)
            module._parameters[name] = nn.Parameter(full, requires_grad=False)
    return model.to(device)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Small random numbers, a stretch of them over and over: drawing them all would take longer."""
    count, generator = math.prod(shape), torch.Generator().manual_seed(0)
    some = (torch.randn(min(_FILL, count), generator=generator) * 0.05).to(device, dtype)
    return some.repeat(-(-count // len(some)))[:count].view(shape)


def restore_buffers(model: nn.Module, buffers: Mapping[str, Tensor], device: torch.device) -> None:
    for name, buffer in buffers.items():
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = buffer.to(device)


def cut_difference(
    uncut: nn.ModuleList,
    twin: nn.ModuleList,
    spans: Sequence[Span],
    described: Mapping[str, tuple[Any, Any]],
) -> str | None:
    """How the layers that stay differ from those of the twin, or None if they do not.

    A layer may keep a field that is ``described``, for all layers, before and after the cut.
    """
    kept = kept_layers(spans, len(uncut))
    if len(twin) != len(kept):
        return f"{len(twin)} layers instead of {len(kept)}"
    for new, old in enumerate(kept):
        difference = _layer_difference(uncut[old], twin[new], old, new, described)
        if difference is not None:
            return f"layer {old}, which becomes layer {new}: {difference}"
    return None


def plain_settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The public attributes of a module that are numbers, flags, texts or collections of them."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training" and _is_plain(value):
            yield name, value


def _layer_difference(
    uncut: nn.Module, twin: nn.Module, old: int, new: int, described: Mapping[str, tuple[Any, Any]]
) -> str | None:
    modules, twins = dict(uncut.named_modules()), dict(twin.named_modules())
    if modules.keys() != twins.keys():
        return f"modules {sorted(modules.keys() ^ twins.keys())} are not in both"
    for path, module in modules.items():
        other = twins[path]
        where = f"{path or 'layer'}: "
        if type(module) is not type(other):
            return f"{where}{type(module).__name__} becomes {type(other).__name__}"
        shapes, other_shapes = _shapes(module), _shapes(other)
        if shapes != other_shapes:
            return f"{where}shapes {shapes} become {other_shapes}"
        settings, other_settings = dict(plain_settings(module)), dict(plain_settings(other))
        for name in sorted(settings.keys() | other_settings.keys()):
            before, after = settings.get(name), other_settings.get(name)
            is_number = type(before) is int and (before, after) == (old, new)
            is_description = (before, after) == described.get(name)
            close = type(before) is type(after) is float and math.isclose(
                before, after, rel_tol=1e-12
            )
            if not (before == after or close or is_number or is_description):
                return f"{where}{name}={shown(before)} becomes {shown(after)}"
    return None


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(isinstance(item, _PLAIN) for item in value)
    if isinstance(value, dict):
        return all(isinstance(item, _PLAIN) for pair in value.items() for item in pair)
    return isinstance(value, _PLAIN)
