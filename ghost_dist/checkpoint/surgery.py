"""Cutting layers out of a model in memory, and putting operators in their place.

The exported checkpoint must compute the same; ``export/verify.py`` compares the two.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghost_dist.checkpoint.architecture import Architecture, cut_config
from ghost_dist.checkpoint.twin import cut_difference, empty_model, plain_settings
from ghost_dist.errors import UnsupportedArchitectureError
from ghost_dist.spans import Span, kept_layers, operator_positions


@dataclass(frozen=True)
class Operator:
    """What acts on the residual stream in place of a removed span.

    Attributes
    ----------
    weight_CC
        W of shape (C_in, C_out): rows are tokens, ``x -> x @ W + bias``.
    bias_C
        Shape (C,), or None.
    """

    weight_CC: Tensor
    bias_C: Tensor | None = None


def remove_layers(model: Any, architecture: Architecture, spans: Sequence[Span]) -> None:
    """Take the layers of ``spans`` out of an uncut causal LM, in place.

    Whatever the family stores per layer (its number, which layers slide, masks by layer type) is
    taken over from a twin that is built from the cut configuration. The layers' memory is freed
    once nothing else refers to them.

    Raises
    ------
    UnsupportedArchitectureError
        If a layer that stays would not be the same layer in the cut model; nothing is changed.
    """
    uncut = model.get_submodule(architecture.layers)
    config = type(model.config).from_dict(cut_config(model.config.to_dict(), spans, architecture))
    for name in ("_attn_implementation", "_experts_implementation"):
        if hasattr(model.config, name):
            setattr(config, name, getattr(model.config, name))
    twin = empty_model(type(model), copy.deepcopy(config))
    difference = cut_difference(uncut, twin.get_submodule(architecture.layers), spans)
    if difference is not None:
        raise UnsupportedArchitectureError(
            f"Family {architecture.model_type} is not supported: without layers "
            f"{', '.join(map(str, spans))}, {difference}."
        )
    kept = nn.ModuleList(uncut[layer] for layer in kept_layers(spans, len(uncut)))
    kept.train(uncut.training)
    model.set_submodule(architecture.layers, kept)
    for path, module in twin.named_modules():
        own = model.get_submodule(path)
        for name, value in plain_settings(module):
            setattr(own, name, value)
        if isinstance(getattr(own, "config", None), type(config)):
            for name in architecture.per_layer_fields:
                if hasattr(config, name):
                    setattr(own.config, name, copy.deepcopy(getattr(config, name)))


def insert_operators(
    model: Any,
    architecture: Architecture,
    spans: Sequence[Span],
    operators: Mapping[Span, Operator],
) -> list[RemovableHandle]:
    """Let each operator act on the stream entering its boundary of a cut causal LM, by hooks.

    A float32 operator is computed in float32 and its result cast back; one of another dtype is
    computed in the dtype of the model.

    Parameters
    ----------
    model
        After :func:`remove_layers` with the same ``spans``.
    spans
        Sorted and joined, as ``check_spans`` gives them.
    operators
        By span; spans without one are cut only.

    Returns
    -------
    list of RemovableHandle
        ``remove()`` takes the operators out again.
    """
    layers = model.get_submodule(architecture.layers)
    handles = []
    for span, position in operator_positions(spans).items():
        if span not in operators:
            continue
        last = position == len(layers)
        module = model.get_submodule(architecture.final_norm) if last else layers[position]
        parameter = next(module.parameters())
        handles.append(
            module.register_forward_pre_hook(
                _operator_hook(operators[span], parameter.dtype, parameter.device),
                with_kwargs=True,
            )
        )
    return handles


def _operator_hook(operator: Operator, dtype: torch.dtype, device: torch.device) -> Any:
    if operator.weight_CC.dtype == torch.float32:
        dtype = torch.float32
    weight_CC = operator.weight_CC.T.to(device, dtype).contiguous()  # (out, in), as nn.Linear
    bias_C = None if operator.bias_C is None else operator.bias_C.to(device, dtype)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x_BTC = args[0] if args else kwargs["hidden_states"]
        y_BTC = nn.functional.linear(x_BTC.to(dtype), weight_CC, bias_C).to(x_BTC.dtype)
        if args:
            return (y_BTC, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": y_BTC}

    return hook
