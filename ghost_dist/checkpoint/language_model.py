"""The language model inside a checkpoint that has other modalities too, taken by itself.

The whole model is built from ``config.json`` without storage, its renamings tell where each tensor
of the files goes, and what lies in the one module that is the base of a causal LM of transformers,
or in the head, gets the name that it has there.
"""

import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from ghost_dist.checkpoint.conversions import places
from ghost_dist.checkpoint.layer_fields import read_config
from ghost_dist.checkpoint.twin import empty_model


@dataclass(frozen=True)
class LanguageModel:
    """What makes a text-only checkpoint of one with other modalities."""

    config: dict[str, Any]
    names: Mapping[str, str]  # in the files -> there; other modalities are left out
    note: str


def language_model(config: Mapping[str, Any], names: Collection[str]) -> LanguageModel | None:
    """The language model of a checkpoint; None if it is all that there is, or none is found."""
    family = config.get("model_type")
    if family not in CONFIG_MAPPING or not CONFIG_MAPPING[family].sub_configs:
        return None
    return _find(json.dumps(config), tuple(names))


@functools.lru_cache(maxsize=4)  # a run opens its checkpoint many times
def _find(content: str, names: tuple[str, ...]) -> LanguageModel | None:
    raw = json.loads(content)
    try:
        config = read_config(raw)
        text_config = config.get_text_config()
        if text_config is config or config.is_encoder_decoder:
            return None
        whole = empty_model(MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)], config)
        text = empty_model(MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)], text_config)
        base = getattr(text, text.base_model_prefix)
    except Exception:  # whatever is wrong with it is said where the architecture is looked at
        return None
    inside = [path for path, module in whole.named_modules() if type(module) is type(base)]
    head, own_head = _path_of_head(whole), _path_of_head(text)
    if len(inside) != 1 or head is None or own_head is None:
        return None
    moves = {f"{inside[0]}.": f"{text.base_model_prefix}.", f"{head}.": f"{own_head}."}
    state = whole.state_dict()
    merged, renamed = places(whole, names), places(whole, names, merged=False)
    kept, left = {}, []
    for name in names:
        target = renamed[name].target
        old = next((old for old in moves if target.startswith(old)), None)
        if old is not None:
            kept[name] = moves[old] + target.removeprefix(old)
        elif merged[name].target in state:
            left.append(merged[name].target)
        else:
            kept[name] = name  # nobody's; named where tensors are checked
    left_out = ("transformers_version", "_name_or_path")
    own = {name: value for name, value in text_config.to_dict().items() if name not in left_out}
    own["architectures"] = [type(text).__name__]
    own["tie_word_embeddings"] = f"{head}.weight" in whole.all_tied_weights_keys
    own["dtype"] = raw.get("dtype", raw.get("torch_dtype", own.get("dtype")))
    parts = sorted({target.removeprefix("model.").partition(".")[0] for target in left})
    note = (
        f"{raw['model_type']} has other modalities: its language model is taken by itself, as a "
        f"{type(text).__name__}; {len(left)} tensors are left out ({', '.join(parts)})."
    )
    return LanguageModel(own, kept, note)


def _path_of_head(model: Any) -> str | None:
    head: nn.Module | None = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None)
