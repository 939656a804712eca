"""Cutting layers out of a model in memory, and putting operators in their place.

The exported checkpoint must compute the same; ``export/verify.py`` compares the two.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.halves import remove_halves
from ghost_dist.checkpoint.layer_fields import cut_config
from ghost_dist.checkpoint.repair import Repair, apply_repair
from ghost_dist.checkpoint.twin import empty_model, plain_settings
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.spans import Span, kept_layers, operator_positions


def remove_layers(model: Any, architecture: Architecture, spans: Sequence[Span]) -> None:
    """Take the layers of ``spans``, which ``check_cut`` allows, out of a causal LM, in place.

    Whatever the family stores per layer (its number, which layers slide, masks by layer type) is
    taken over from a twin that is built from the cut configuration.
    """
    uncut, before = model.get_submodule(architecture.layers), model.config.to_dict()
    cut = cut_config(before, spans, architecture.fields)
    config = type(model.config).from_dict(cut)
    changed = [name for name, value in config.to_dict().items() if value != before.get(name)]
    for name in ("_attn_implementation", "_experts_implementation"):
        if hasattr(model.config, name):
            setattr(config, name, getattr(model.config, name))
    twin = empty_model(type(model), copy.deepcopy(config))
    keyed = architecture.fields.keyed
    kept = nn.ModuleList(uncut[layer] for layer in kept_layers(spans, len(uncut)))
    kept.train(uncut.training)
    model.set_submodule(architecture.layers, kept)
    for path, module in twin.named_modules():
        own = model.get_submodule(path)
        for name, value in plain_settings(module):
            setattr(own, name, value)
        if isinstance(getattr(own, "config", None), type(config)):
            for name in changed:
                # What is keyed by layers is set as a mapping and reads as something else.
                value = cut[name] if name in keyed else getattr(config, name)
                setattr(own.config, name, copy.deepcopy(value))


def insert_operators(model: Any, architecture: Architecture, variant: Variant) -> None:
    """Take halves out, and let operators act on the stream entering their boundary of a cut model.

    A float32 operator is computed in float32 and its result cast back; one of another dtype is
    computed in the dtype of the model. New down_proj weights take the model's dtype.
    """
    layers, spans = model.get_submodule(architecture.layers), variant.spans
    remove_halves(model, architecture, spans, variant.sublayers)
    kept = kept_layers(spans, len(layers) + sum(map(len, spans)))
    positions = operator_positions(spans)
    for span, repair in variant.at_boundary.items():
        last = positions[span] == len(layers)
        path = architecture.final_norm if last else f"{architecture.layers}.{positions[span]}"
        module = model.get_submodule(path)
        parameter = next(module.parameters())
        computed = operator_as_computed(repair, parameter.dtype, parameter.device)
        module.register_forward_pre_hook(partial(_repair_hook, computed), with_kwargs=True)
    for layer, down_FC in variant.downs.items():
        path = architecture.down_projections[layer]
        set_weight(layers[kept.index(layer)].get_submodule(path), down_FC)
    for one, weight_FC in variant.outputs.items():
        writer = architecture.halves[one.layer][one.part].writer
        set_weight(layers[kept.index(one.layer)].get_submodule(writer), weight_FC)


def set_weight(module: Any, weight_FC: Tensor) -> None:
    """Give a linear module another weight, (in, out), in its own dtype."""
    weight_CF = weight_FC.T.to(module.weight.device, module.weight.dtype).contiguous()
    module.weight = nn.Parameter(weight_CF, requires_grad=False)


def operator_as_computed(repair: Repair, dtype: torch.dtype, device: torch.device) -> Repair:
    """An operator as a model of this dtype applies it, on the device."""
    if repair.dtype == torch.float32:
        dtype = torch.float32
    repair = repair.stored(dtype, dtype).to(device)
    # nn.Linear's layout (out, in) in memory: the same kernels as the exported module, bit by bit.
    parts = {name: part.T.contiguous().T for name, part in repair.boundary_parts().items()}
    return Repair.from_parts(parts, repair.norm_eps)


def repair_stream(repair: Repair, x_BTC: Tensor) -> Tensor:
    """What an operator makes of the stream at its boundary, in the stream's dtype."""
    return apply_repair(repair, x_BTC).to(x_BTC.dtype)


def _repair_hook(
    repair: Repair, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    y_BTC = repair_stream(repair, args[0] if args else kwargs["hidden_states"])
    if args:
        return (y_BTC, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": y_BTC}
