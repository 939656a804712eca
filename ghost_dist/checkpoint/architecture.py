"""Where a decoder-only model keeps its layers, embeddings, final norm and head.

Found on the meta device from ``config.json``, without weights. Only families whose code is part of
transformers: the recovered checkpoint must not depend on code that came with the original.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ghost_dist.checkpoint.conversions import Place
from ghost_dist.checkpoint.layer_fields import (
    MTP_COUNTS,
    LayerFields,
    cut_config,
    descriptions,
    find_layer_fields,
    read_config,
)
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.tensor_check import check_tensors
from ghost_dist.checkpoint.twin import cut_difference, empty_model
from ghost_dist.errors import CheckpointError, UnsupportedArchitectureError
from ghost_dist.spans import Part, Span


@dataclass(frozen=True)
class Half:
    """The attention or the MLP of a layer, found by ``engines/find_halves.py``."""

    root: str  # name in the layer of the module that adds zero where the half is removed
    outputs: int  # length of the tuple that it returns, what is added first; 0: that alone
    idle: tuple[str, ...]  # names in the layer of what only the half needs, such as a norm
    tensors: tuple[str, ...] = ()  # their names in the files
    writer: str = ""  # name in the layer of the linear module whose output is added as it is,
    writer_tensor: str = ""  # and of its weight in the files; empty: none can be replaced


_FINAL_NORMS = ("final_layer_norm", "final_layernorm", "final_norm")
"""Names that say it where the norm is not declared behind the layers."""


@dataclass(frozen=True)
class Architecture:
    """What has to be known of a family to cut its models."""

    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    config_class: type[Any]  # the three: of transformers
    base_class: type[Any]
    causal_lm_class: type[Any]
    base_prefix: str  # of the causal LM, such as "model"
    layers: str  # this and the next: module paths in the causal LM
    embeddings: str
    final_norm: str
    final_norm_class: str
    head: str
    tensor_prefix: str  # what the files call the layers; next, the final norm
    final_norm_in_files: str
    above_in_files: tuple[str, ...]  # tensors of the final norm and the head
    unused: frozenset[str]  # tensors that the model does not take and need not
    norm_eps: float
    down_projections: Mapping[int, str]  # layer -> path in it, such as "mlp.down_proj"
    inner_sizes: Mapping[int, int]  # layer -> width F that its down_proj reads
    fields: LayerFields
    halves: Mapping[int, Mapping[Part, Half]] = field(default_factory=dict)  # empty: not looked for

    @property
    def of_base(self) -> Architecture:
        """With paths as they are in the model without its head."""
        return replace(
            self,
            base_prefix="",
            layers=self.in_base(self.layers),
            embeddings=self.in_base(self.embeddings),
            final_norm=self.in_base(self.final_norm),
        )

    def in_base(self, path: str) -> str:
        return path.removeprefix(self.base_prefix + ".")


def inspect_architecture(checkpoint: Checkpoint) -> Architecture:
    """Find the parts of the model, on the meta device; what may be cut says ``check_cut``."""
    config = _read_config(checkpoint)
    family = config.model_type
    model_class = causal_lm_class(config)
    fields = find_layer_fields(config)
    try:
        model = empty_model(model_class, config)
    except Exception as error:
        raise UnsupportedArchitectureError(
            f"Family {family}: {model_class.__name__} cannot be built from "
            f"{checkpoint.path / 'config.json'}: {error}"
        ) from error
    base_prefix = _base_prefix(model)
    base = model.get_submodule(base_prefix)
    layers = _layer_list(model, config)
    paths = {id(module): path for path, module in model.named_modules()}
    embeddings = paths.get(id(model.get_input_embeddings()))
    head = paths.get(id(model.get_output_embeddings()))
    if embeddings is None or head is None:
        raise _refused(family, "its token embeddings or its head could not be found")
    final_norm = _final_norm(model, layers, config)
    places, unused = check_tensors(checkpoint, model, _is_further(checkpoint, layers, config))
    tensor_prefix = _tensor_prefix(places, layers, family)
    above = {
        name: place.target
        for name, place in places.items()
        if place.target.startswith((f"{final_norm}.", f"{head}."))
    }
    norm = model.get_submodule(final_norm)
    epsilons = [getattr(norm, name, None) for name in ("variance_epsilon", "eps", "norm_eps")]
    down = _down_projections(model.get_submodule(layers), checkpoint, tensor_prefix, config)
    architecture = Architecture(
        model_type=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        config_class=type(config),
        base_class=type(base),
        causal_lm_class=model_class,
        base_prefix=base_prefix,
        layers=layers,
        embeddings=embeddings,
        final_norm=final_norm,
        final_norm_class=type(norm).__name__,
        head=head,
        tensor_prefix=tensor_prefix,
        final_norm_in_files=_in_files(final_norm, above, tensor_prefix),
        above_in_files=tuple(above),
        unused=unused,
        norm_eps=next((eps for eps in epsilons if isinstance(eps, float)), 1e-6),
        down_projections={layer: path for layer, (path, _) in down.items()},
        inner_sizes={layer: size for layer, (_, size) in down.items()},
        fields=fields,
    )
    _refuse_shared_weights(model, layers, family)
    return architecture


def layer_sizes(
    checkpoint: Checkpoint, architecture: Architecture
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers stored of every layer, and their bytes."""
    numbers, nbytes = [0] * architecture.num_layers, [0] * architecture.num_layers
    pattern = re.compile(re.escape(architecture.tensor_prefix) + r"\.(\d+)\.")
    for name, tensor in checkpoint.tensors.items():
        match = pattern.match(name)
        if match is not None and int(match[1]) < architecture.num_layers:
            numbers[int(match[1])] += math.prod(tensor.shape)
            nbytes[int(match[1])] += checkpoint.stored_bytes(name)
    return tuple(numbers), tuple(nbytes)


def exported_sizes(checkpoint: Checkpoint, architecture: Architecture) -> tuple[int, ...]:
    """Bytes of every layer in an exported checkpoint: what was FP8 is bfloat16 there."""
    numbers, nbytes = layer_sizes(checkpoint, architecture)
    if not checkpoint.scales:
        return nbytes
    return tuple(checkpoint.dtype.itemsize * count for count in numbers)


def check_cut(architecture: Architecture, config: Mapping[str, Any], spans: Sequence[Span]) -> None:
    """Prove, without weights, that the cut configuration describes the layers that stay."""
    reason = why_not(architecture, config, spans)
    if reason is None:
        before, _ = _built(architecture, config)
        after, _ = _built(architecture, cut_config(config, spans, architecture.fields))
        if cache_problem(before) is None and cache_problem(after) is not None:
            reason = (
                f"without layers {', '.join(map(str, spans))} no attention layer is left, and "
                "transformers generates with a cache only where one counts the tokens"
            )
    if reason is not None:
        advice = "Remove other layers (selection.spans, selection.protect)"
        raise _refused(architecture.model_type, reason, advice)


def why_not(
    architecture: Architecture, config: Mapping[str, Any], spans: Sequence[Span]
) -> str | None:
    """Why the cut configuration does not describe the layers that stay; None if it does."""
    cut = ", ".join(map(str, spans))
    try:
        after, twins = _built(architecture, cut_config(config, spans, architecture.fields))
    except Exception as error:
        return f"no model can be built without layers {cut}: {error}"
    before, layers = _built(architecture, config)
    described = descriptions(architecture.fields, before, after)
    if (difference := cut_difference(layers, twins, spans, described)) is None:
        return None
    return f"its configuration cannot express the model without layers {cut}: {difference}"


def _built(architecture: Architecture, config: Mapping[str, Any]) -> tuple[Any, nn.ModuleList]:
    """A configuration as its class reads it, and the layers of its model, without storage."""
    return _build(architecture.layers, json.dumps(config))


# A search asks of hundreds of cuts; of layers without fields of their own, those of a size are one.
@functools.lru_cache(maxsize=4)
def _build(layers: str, content: str) -> tuple[Any, nn.ModuleList]:
    config, own = (read_config(json.loads(content)) for _ in range(2))
    return config, empty_model(causal_lm_class(own), own).get_submodule(layers)


def check_some_cut(
    architecture: Architecture, config: Mapping[str, Any], candidates: Iterable[Sequence[Span]]
) -> None:
    """Refuse a family that can be cut nowhere where it may be; see :func:`check_cut`."""
    refusal = None
    for spans in candidates:
        try:
            check_cut(architecture, config, spans)
        except UnsupportedArchitectureError as error:
            refusal = error
        else:
            return
    if refusal is not None:
        raise refusal


def cache_problem(config: Any) -> str | None:
    """Why the cache that transformers makes for a configuration does not count tokens, if so."""
    try:
        transformers.DynamicCache(config=config).get_seq_length()
    except Exception as error:  # ValueError where no layer attends; without this cache: anything
        return f"{type(error).__name__}: {error}"
    return None


def _read_config(checkpoint: Checkpoint) -> Any:
    raw = checkpoint.config
    family = raw.get("model_type")
    where = checkpoint.path / "config.json"
    if not isinstance(family, str):
        raise CheckpointError(f"{where} has no model_type, so the model's family is unknown.")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown method")
        raise UnsupportedArchitectureError(
            f"{checkpoint.path} is quantised ({method}), and so cannot be cut and repaired. Give "
            "the checkpoint that it was made from, in bfloat16, float16 or float32, or one in FP8 "
            "with scales of tensors, rows or blocks. The result may be quantised afterwards."
        )
    if family not in CONFIG_MAPPING:
        code = " (its code comes with the checkpoint and is never run)" if "auto_map" in raw else ""
        raise _refused(family, f"transformers {transformers.__version__} does not know it{code}")
    try:
        config = read_config(raw)
    except Exception as error:
        raise CheckpointError(f"{where} is not a valid {family} configuration: {error}") from error
    if config.is_encoder_decoder:
        raise _refused(family, "it is an encoder-decoder; only decoder-only models can be cut")
    if config.get_text_config() is not config:
        raise _refused(
            family,
            "it wraps a language model with other modalities, and transformers has no causal "
            "language model of that part by itself",
        )
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise _refused(family, "its configuration has no number of layers")
    return config


def causal_lm_class(config: Any) -> type[Any]:
    """transformers' class of the causal language model that a configuration describes."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refused(config.model_type, "transformers has no causal language model of it")
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class: type[Any] = found[0] if isinstance(found, (list, tuple)) else found
    return model_class


def _base_prefix(model: Any) -> str:
    """Where the base model is; a few families do not have it under the name that they give."""
    children: dict[str, nn.Module] = dict(model.named_children())
    prefix: str = model.base_model_prefix
    if prefix in children:
        return prefix
    found = [name for name, module in children.items() if isinstance(module, PreTrainedModel)]
    if len(found) != 1:
        raise _refused(model.config.model_type, f"{type(model).__name__} has no base model inside")
    return found[0]


def _layer_list(model: Any, config: Any) -> str:
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None
    }
    outer = {p: m for p, m in lists.items() if not any(p.startswith(o + ".") for o in lists)}
    found = [path for path, module in outer.items() if len(module) == config.num_hidden_layers]
    if len(found) != 1 or len(outer) != 1:
        listed = ", ".join(f"{path} ({len(module)})" for path, module in outer.items()) or "none"
        raise _refused(
            config.model_type,
            f"its {config.num_hidden_layers} layers are not the one list of the model "
            f"(lists found: {listed})",
        )
    return str(found[0])


def _final_norm(model: Any, layers: str, config: Any) -> str:
    parent, _, name = layers.rpartition(".")
    children = list(model.get_submodule(parent).named_children())
    after = children[[child for child, _ in children].index(name) + 1 :]
    norms = [child for child, module in after if "norm" in type(module).__name__.lower()]
    norms = norms or [child for child, _ in children if child in _FINAL_NORMS]
    if len(norms) != 1:
        raise _refused(
            config.model_type,
            f"there is not exactly one norm behind the layers (found: {norms or 'none'})",
        )
    return f"{parent}.{norms[0]}"


def _is_further(checkpoint: Checkpoint, layers: str, config: Any) -> Callable[[str], bool]:
    """Whether a tensor is of layers behind the last one, which predict further tokens (MTP)."""
    said = any(checkpoint.config.get(name) for name in MTP_COUNTS)
    number = re.compile(re.escape(layers) + r"\.(\d+)\.")

    def is_further(target: str) -> bool:
        found = number.match(target)
        behind = found is not None and int(found[1]) >= config.num_hidden_layers
        return said and (behind or "mtp" in target.split("."))

    return is_further


def _tensor_prefix(places: Mapping[str, Place], layers: str, family: str) -> str:
    """What the files call the list of layers."""
    pattern = re.compile(re.escape(layers) + r"(\.\d+\.)")
    prefixes = {
        name.partition(found[1])[0]
        for name, place in places.items()
        if (found := pattern.match(place.target))
    }
    if len(prefixes) != 1:
        raise _refused(family, f"the files call its layers by several names: {sorted(prefixes)}")
    return prefixes.pop()


def _in_files(final_norm: str, above: Mapping[str, str], tensor_prefix: str) -> str:
    """What the files call the final norm; where it has no weight, would call it."""
    for name, target in above.items():
        if target.startswith(f"{final_norm}."):
            return name.removesuffix(target.removeprefix(final_norm))
    parent, norm = tensor_prefix.rpartition(".")[0], final_norm.rpartition(".")[2]
    return f"{parent}.{norm}" if parent else norm


def _down_projections(
    layers: Any, checkpoint: Checkpoint, tensor_prefix: str, config: Any
) -> dict[int, tuple[str, int]]:
    """Layer to the path and the input width of its MLP's last linear module, where it has one."""
    found: dict[int, tuple[str, int]] = {}
    for index, layer in enumerate(layers):
        wide = [
            (path, module.in_features)
            for path, module in layer.named_modules()
            if isinstance(module, nn.Linear)
            and (path.startswith(("mlp.", "feed_forward.", "ffn.")) or "." not in path)
            and path.count(".") <= 1
            and "gate" not in path
            # Only tensors that the files hold under the module's own name can be rewritten.
            and (tensor := checkpoint.tensors.get(f"{tensor_prefix}.{index}.{path}.weight"))
            and tensor.shape == (config.hidden_size, module.in_features)
            and module.out_features == config.hidden_size
        ]
        if len(wide) == 1:
            found[index] = wide[0]
    common = {path for path, _ in found.values()}
    return found if len(common) == 1 else {}


def _refuse_shared_weights(model: Any, layers: str, family: str) -> None:
    modules = [id(m) for layer in model.get_submodule(layers) for m in layer.modules()]
    tied = [
        name
        for pair in getattr(model, "all_tied_weights_keys", {}).items()
        for name in pair
        if name.startswith(layers + ".")
    ]
    if len(set(modules)) != len(modules) or tied:
        raise _refused(family, "layers share weights, so a layer cannot be removed by itself")


def _refused(family: str, reason: str, advice: str = "") -> UnsupportedArchitectureError:
    advice = advice and f" {advice}."
    return UnsupportedArchitectureError(f"Family {family} is not supported: {reason}.{advice}")
