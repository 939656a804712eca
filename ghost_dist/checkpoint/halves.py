"""A layer without its attention or its MLP, in memory: modules that add nothing to the stream.

The exported modeling file does the same by its own code (``export/modeling_template.py.txt``).
"""

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ghost_dist.checkpoint.architecture import Architecture, cache_problem
from ghost_dist.checkpoint.layer_fields import cut_config, read_config
from ghost_dist.errors import UnsupportedArchitectureError
from ghost_dist.spans import Span, Sublayer, kept_layers


class Nothing(nn.Module):
    """What takes the place of a half: zeros of the stream's width, in the form of its output."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.forward = zeros(width, outputs)


def zeros(width: int, outputs: int) -> Callable[..., Any]:
    """A forward that adds nothing to a stream of that width; see ``Half.outputs``."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        return in_form(x.new_zeros(*x.shape[:-1], width), outputs)

    return forward


def in_form(output: Tensor, length: int) -> Any:
    """An output as a module returns it: first in a tuple of that length; 0: alone."""
    return (output, *(None,) * (length - 1)) if length else output


@contextlib.contextmanager
def forward_of(module: Any, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Another forward for a module for a while; it may have one of its own (accelerate's hooks)."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def remove_halves(
    model: Any, architecture: Architecture, spans: Sequence[Span], sublayers: Collection[Sublayer]
) -> None:
    """Take halves out of a causal LM, in place, whose ``spans`` were removed before."""
    layers = model.get_submodule(architecture.layers)
    kept = kept_layers(spans, architecture.num_layers)
    for sublayer in sublayers:
        layer = layers[kept.index(sublayer.layer)]
        half = architecture.halves[sublayer.layer][sublayer.part]
        layer.set_submodule(half.root, Nothing(architecture.hidden_size, half.outputs))
        for name in half.idle:
            layer.set_submodule(name, nn.Identity())
    gone = {kept.index(one.layer) for one in sublayers if one.part == "attention"}
    if gone:
        config_class = type(model.config)
        uncached = _uncached(config_class, gone)
        for module in model.modules():
            if type(config := getattr(module, "config", None)) is config_class:
                config.__class__ = uncached


def check_halves(
    architecture: Architecture,
    config: Mapping[str, Any],
    spans: Sequence[Span],
    sublayers: Collection[Sublayer],
) -> None:
    """Refuse to remove halves of layers that were found to have none, or every attention."""
    for sublayer in sublayers:
        if sublayer.part not in architecture.halves.get(sublayer.layer, {}):
            raise UnsupportedArchitectureError(
                f"{sublayer} of the family {architecture.model_type} cannot be removed by itself: "
                f"layer {sublayer.layer} is not an attention and an MLP that are added to the "
                "stream. Remove the whole layer (selection.spans)."
            )
    kept = kept_layers(spans, architecture.num_layers)
    gone = {kept.index(one.layer) for one in sublayers if one.part == "attention"}
    if gone:
        cut = read_config(cut_config(config, spans, architecture.fields))
        cut.__class__ = _uncached(type(cut), gone)
        if (problem := cache_problem(cut)) is not None:
            raise UnsupportedArchitectureError(
                f"Without {', '.join(map(str, sublayers))} transformers keeps no cache for "
                f"{architecture.model_type} models ({problem}). Keep an attention, or remove MLPs "
                "and whole layers."
            )


def _uncached(config_class: type[Any], layers: Collection[int]) -> type[Any]:
    """The class of a configuration that tells transformers' caches which layers have nothing."""

    def get_text_config(self: Any, decoder: Any = None, encoder: Any = None) -> Any:
        config = config_class.get_text_config(self, decoder=decoder, encoder=encoder)
        if not decoder:
            return config
        slides = getattr(config, "sliding_window", None) is not None
        plain = "sliding_attention" if slides else "full_attention"
        types = list(getattr(config, "layer_types", None) or [plain] * config.num_hidden_layers)
        for layer in layers:
            types[layer] = "mlp"  # transformers' type of a layer that has nothing to cache
        cached = copy.copy(config)
        cached.layer_types = types
        return cached

    return type(config_class.__name__, (config_class,), {"get_text_config": get_text_config})
