"""Cutting layers out of a model in memory, and putting operators in their place.

The exported checkpoint must compute the same; ``export/verify.py`` compares the two.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghost_dist.checkpoint.architecture import Architecture, cut_config
from ghost_dist.checkpoint.layer_fields import descriptions
from ghost_dist.checkpoint.repair import Repair, apply_repair
from ghost_dist.checkpoint.twin import cut_difference, empty_model, plain_settings
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.errors import UnsupportedArchitectureError
from ghost_dist.spans import Span, kept_layers, operator_positions


def remove_layers(model: Any, architecture: Architecture, spans: Sequence[Span]) -> None:
    """Take the layers of ``spans`` out of an uncut causal LM, in place.

    Whatever the family stores per layer (its number, which layers slide, masks by layer type) is
    taken over from a twin that is built from the cut configuration. The layers' memory is freed
    once nothing else refers to them.
    """
    uncut = model.get_submodule(architecture.layers)
    cut = cut_config(model.config.to_dict(), spans, architecture)
    config = type(model.config).from_dict(cut)
    for name in ("_attn_implementation", "_experts_implementation"):
        if hasattr(model.config, name):
            setattr(config, name, getattr(model.config, name))
    twin = empty_model(type(model), copy.deepcopy(config))
    described = descriptions(architecture.fields, model.config, config)
    difference = cut_difference(uncut, twin.get_submodule(architecture.layers), spans, described)
    if difference is not None:
        raise UnsupportedArchitectureError(
            f"Family {architecture.model_type} is not supported: without layers "
            f"{', '.join(map(str, spans))}, {difference}."
        )
    keyed = architecture.fields.keyed
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
                    # What is keyed by layers is set as a mapping and reads as something else.
                    value = cut[name] if name in keyed else getattr(config, name)
                    setattr(own.config, name, copy.deepcopy(value))


def insert_operators(
    model: Any, architecture: Architecture, variant: Variant
) -> Callable[[], None]:
    """Let each operator act on the stream entering its boundary of a cut causal LM.

    A float32 operator is computed in float32 and its result cast back; one of another dtype is
    computed in the dtype of the model. New down_proj weights take the model's dtype. Returns what
    takes everything out again.
    """
    layers = model.get_submodule(architecture.layers)
    spans = variant.spans
    kept = kept_layers(spans, len(layers) + sum(map(len, spans)))
    positions = operator_positions(spans)
    return _install(
        model,
        architecture,
        {positions[span]: repair for span, repair in variant.at_boundary.items()},
        {kept.index(layer): down_FC for layer, down_FC in variant.downs.items()},
    )


@contextlib.contextmanager
def as_variant(model: Any, architecture: Architecture, variant: Variant) -> Iterator[None]:
    """Let an uncut model compute as a variant of it, without a second copy.

    Removed layers hand their input on, operators act at the stops of their spans. Per-layer
    settings are the uncut model's own, so nothing is renumbered.
    """
    layers = model.get_submodule(architecture.layers)
    uninstall = _install(
        model,
        architecture,
        {span.stop: repair for span, repair in variant.at_boundary.items()},
        variant.downs,
    )
    try:
        with bypassed(model, layers, sorted(variant.removed)):
            yield
    finally:
        uninstall()


@contextlib.contextmanager
def bypassed(model: Any, layers: Any, skipped: Sequence[int]) -> Iterator[None]:
    """Let some of a model's layers hand their input stream on unchanged, computing nothing."""

    learn_return_types(model, [layers[index] for index in skipped])
    own = {index: layers[index].__dict__.get("forward") for index in skipped}  # accelerate's hooks
    for index in skipped:
        layers[index].__dict__["forward"] = handing_on(type(layers[index]))
    try:
        yield
    finally:
        for index, forward in own.items():
            del layers[index].__dict__["forward"]
            if forward is not None:
                layers[index].__dict__["forward"] = forward


@contextlib.contextmanager
def entering_at(model: Any, layers: Any, first: int, stream_BTC: Tensor) -> Iterator[None]:
    """Let a model run from layer ``first`` on, with ``stream_BTC`` entering it.

    The layers below hand on what nobody reads; the token ids only have to be of the same shape.
    The model's own forward makes masks and positions.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (stream_BTC, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": stream_BTC}

    with bypassed(model, layers, range(first)):
        handle = layers[first].register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()


_TUPLE_LENGTH: dict[type, int] = {}
"""Length of the tuple in which a class of decoder layers returns its stream first; 0: alone."""


def note_return_type(layer_class: type, output: Any) -> None:
    """Remember how a class of decoder layers returns its stream."""
    _TUPLE_LENGTH[layer_class] = len(output) if isinstance(output, tuple) else 0


def handing_on(layer_class: type) -> Callable[..., Any]:
    """A forward for a layer that hands its input stream on, in the form of its class.

    Before it is called, one layer of the class must have been run by :func:`bypassed` or seen by
    :func:`note_return_type`.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        tuple_length = _TUPLE_LENGTH[layer_class]
        stream = args[0] if args else kwargs["hidden_states"]
        return (stream, *(None,) * (tuple_length - 1)) if tuple_length else stream

    return forward


@torch.inference_mode()
def learn_return_types(model: Any, layers: Iterable[nn.Module]) -> None:
    """Look at what layers return; annotations are missing or wrong in several families."""
    unknown = [layer for layer in layers if type(layer) not in _TUPLE_LENGTH]
    if not unknown:
        return

    def note(module: nn.Module, _: Any, output: Any) -> None:
        note_return_type(type(module), output)

    handles = [layer.register_forward_hook(note) for layer in unknown]
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _install(
    model: Any,
    architecture: Architecture,
    at_boundary: Mapping[int, Repair],
    down_of_layer: Mapping[int, Tensor],
) -> Callable[[], None]:
    layers = model.get_submodule(architecture.layers)
    undo: list[Callable[[], None]] = []
    for boundary, repair in at_boundary.items():
        last = boundary == len(layers)
        module = model.get_submodule(architecture.final_norm) if last else layers[boundary]
        parameter = next(module.parameters())
        hook = repair_hook(operator_as_computed(repair, parameter.dtype, parameter.device))
        undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
    for layer, down_FC in down_of_layer.items():
        module = layers[layer].get_submodule(down_path(architecture))
        undo.append(functools.partial(setattr, module, "weight", module.weight))
        weight_CF = down_FC.T.to(module.weight.device, module.weight.dtype).contiguous()
        module.weight = nn.Parameter(weight_CF, requires_grad=False)

    def uninstall() -> None:
        for step in undo:
            step()

    return uninstall


def down_path(architecture: Architecture) -> str:
    """Path of the down_proj within a layer, the same in every layer that has one."""
    return next(iter(architecture.down_projections.values()))


def operator_as_computed(repair: Repair, dtype: torch.dtype, device: torch.device) -> Repair:
    """An operator as a model of this dtype applies it, on the device."""
    if repair.dtype == torch.float32:
        dtype = torch.float32
    repair = repair.stored(dtype, dtype).to(device)
    # nn.Linear's layout (out, in) in memory: the same kernels as the exported module, bit by bit.
    parts = {
        name: part.T.contiguous().T if part.ndim == 2 else part
        for name, part in repair.boundary_parts().items()
    }
    return Repair.from_parts(parts, repair.norm_eps)


def repair_stream(repair: Repair, x_BTC: Tensor) -> Tensor:
    """What an operator makes of the stream at its boundary, in the stream's dtype."""
    return apply_repair(repair, x_BTC).to(x_BTC.dtype)


def repair_hook(repair: Repair) -> Callable[..., Any]:
    """Forward pre-hook (with kwargs) that repairs the stream entering a module, in its dtype."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x_BTC = args[0] if args else kwargs["hidden_states"]
        y_BTC = repair_stream(repair, x_BTC)
        if args:
            return (y_BTC, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": y_BTC}

    return hook
