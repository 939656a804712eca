"""Which fields of a model configuration speak of single layers, and the configuration after a cut.

What a family computes from the layer's number becomes explicit here, because the numbers change
when layers go. That the result describes the same layers is checked in ``twin.py``.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ghost_dist.amounts import shown
from ghost_dist.errors import UnsupportedArchitectureError
from ghost_dist.spans import Span, kept_layers

_INDEX_LISTS = {"mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices"}
_PREFIX_COUNTS = (
    *("first_k_dense_replace", "max_window_layers", "num_dense_layers"),
    "moe_layer_start_index",
)
_CYCLES = ("block_types",)  # lists that are repeated until every layer has an entry
_KEYED = ("per_layer_config",)  # settings by layer number; keys that are no numbers stay
_TIMES_ROOT_OF_DEPTH = ("scale_depth",)
"""Divided by the root of the number of layers in every layer."""
MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_PATTERNS = {
    "layer_types": ("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval"),
    "no_rope_layers": ("no_rope_layer_interval",),
    "moe_layers": ("interleave_moe_layer_step",),
}
"""Fields that only generate an explicit one; they would be wrong after a cut."""

_ENTANGLED = {
    "num_kv_shared_layers": "later layers reuse the keys and values of earlier ones",
    "hidden_size_per_layer_input": "each layer has an input of its own beside the residual stream",
    "scale_attn_by_inverse_layer_idx": "attention is scaled by the layer's number",
    "rescale_every": "weights are rescaled by the layer's number",
}
_NOT_PER_LAYER = ("architectures", "token_id", "token_ids", "_limit", "_section", "_sizes")


@dataclass(frozen=True)
class LayerFields:
    """The per-layer content of a configuration of ``num_layers`` layers."""

    num_layers: int
    count_names: tuple[str, ...]  # the first is the family's own
    lists: Mapping[str, Sequence[Any] | str]  # one entry or letter per layer
    indices: Mapping[str, tuple[int, ...]]  # lists of layer numbers
    keyed: Mapping[str, Mapping[str, Any]]  # mappings from layer numbers, as text
    counts: Mapping[str, int]  # how many of the first layers differ from the rest
    scaled: Mapping[str, float]  # divided by the root of the number of layers
    changed: Mapping[str, Any]  # new value whatever is cut, such as a step of 1
    removed: tuple[str, ...]


def find_layer_fields(config: Any) -> LayerFields:
    fields = config.to_dict()
    family = config.model_type
    for name, reason in _ENTANGLED.items():
        if fields.get(name):
            raise UnsupportedArchitectureError(
                f"Family {family} is not supported: {reason} ({name}={shown(fields[name])}), so a "
                "layer cannot be removed by itself."
            )
    if "shared" in (fields.get("indexer_types") or ()):
        raise UnsupportedArchitectureError(
            f"Family {family} is not supported: layers reuse the token selection of earlier ones "
            "(indexer_types), so a layer cannot be removed by itself."
        )
    num_layers: int = config.num_hidden_layers
    own_name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    lists: dict[str, Any] = {}
    indices: dict[str, tuple[int, ...]] = {}
    for name, value in fields.items():
        if name.endswith(_NOT_PER_LAYER) or name.startswith("mtp_"):
            continue
        if isinstance(value, str) and len(value) == num_layers and name.endswith("pattern"):
            lists[name] = value
        if not isinstance(value, (list, tuple)):
            continue
        if name in _CYCLES and value:
            value = (list(value) * num_layers)[:num_layers]
        if name in _INDEX_LISTS or (_are_layer_numbers(name, value, num_layers)):
            indices[name] = tuple(value)
        elif len(value) == num_layers:
            lists[name] = list(value)
    changed: dict[str, Any] = {name: 0 for name in MTP_COUNTS if fields.get(name)}
    step = fields.get("decoder_sparse_step")
    if isinstance(step, int) and step > 1:
        dense = {i for i in range(num_layers) if (i + 1) % step}
        indices["mlp_only_layers"] = tuple(sorted(dense | set(indices.get("mlp_only_layers", ()))))
        changed["decoder_sparse_step"] = 1
    count_names = [own_name, "num_hidden_layers"]
    if fields.get("num_blocks") == num_layers:
        count_names.append("num_blocks")
    return LayerFields(
        num_layers=num_layers,
        count_names=tuple(dict.fromkeys(count_names)),
        lists=lists,
        indices=indices,
        keyed={name: dict(fields[name]) for name in _KEYED if fields.get(name)},
        counts={n: fields[n] for n in _PREFIX_COUNTS if isinstance(fields.get(n), int)},
        scaled={n: fields[n] for n in _TIMES_ROOT_OF_DEPTH if fields.get(n)},
        changed=changed,
        removed=(
            *(p for name in _PATTERNS if name in lists or name in indices for p in _PATTERNS[name]),
            *(name for name in fields if name.startswith("mtp_") and name not in changed),
        ),
    )


def cut_config(
    config: Mapping[str, Any], spans: Sequence[Span], fields: LayerFields
) -> dict[str, Any]:
    """The configuration without the removed layers; nothing else changes."""
    cut = copy.deepcopy(dict(config))
    if not spans:
        return cut
    kept = kept_layers(spans, fields.num_layers)
    position = {old: new for new, old in enumerate(kept)}
    for name in [name for name in fields.count_names if name in cut] or fields.count_names[:1]:
        cut[name] = len(kept)
    for name, values in fields.lists.items():
        chosen = [values[layer] for layer in kept]
        cut[name] = "".join(chosen) if isinstance(values, str) else chosen
    for name, layers in fields.indices.items():
        cut[name] = [position[layer] for layer in layers if layer in position]
    for name, settings in fields.keyed.items():
        cut[name] = {
            str(position[int(key)]) if str(key).isdigit() else key: copy.deepcopy(value)
            for key, value in settings.items()
            if not str(key).isdigit() or int(key) in position
        }
    for name, number in fields.scaled.items():
        cut[name] = number * math.sqrt(len(kept) / fields.num_layers)
    for name, count in fields.counts.items():
        cut[name] = sum(layer < count for layer in kept)
    cut.update(fields.changed)
    for name in fields.removed:
        cut.pop(name, None)
    return cut


def descriptions(fields: LayerFields, uncut: Any, cut: Any) -> dict[str, tuple[Any, Any]]:
    """Fields of two transformers configurations that only describe all layers, before and after.

    Not numbers of layers: some families compute with those in every layer.
    """
    before, after = uncut.to_dict(), cut.to_dict()
    names = (*fields.lists, *fields.indices, *fields.removed)
    return {name: (before.get(name), after.get(name)) for name in names}


def read_config(raw: Mapping[str, Any]) -> Any:
    """Of the content of ``config.json``, with transformers' spelling of Infinity and NaN."""
    return CONFIG_MAPPING[raw["model_type"]].from_dict(_with_floats(dict(raw)))


def _with_floats(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def _are_layer_numbers(name: str, value: Sequence[Any], num_layers: int) -> bool:
    return (
        0 < len(value) < num_layers
        and ("layer" in name or "idx" in name or "indices" in name)
        and all(type(item) is int and 0 <= item < num_layers for item in value)
        and len(set(value)) == len(value)
    )
