"""Seconds of each decoder layer in a request as ``bench-serving`` makes it, on the run's device."""

import gc
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.layer_fields import cut_config, read_config
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.twin import random_model, random_tensor
from ghost_dist.config import Config
from ghost_dist.devices import free_bytes, open_device, release_cached
from ghost_dist.engines.model_sizes import model_sizes
from ghost_dist.errors import ConfigError
from ghost_dist.pipeline.automatic import compute_dtype
from ghost_dist.pipeline.turns import BATCH, NEW, PROMPT, Turn, take_turns, timed
from ghost_dist.spans import Span, check_spans

_TIMED_NEW = 17  # tokens that are generated to know the time of one
_ROUNDS = 5
_SHARE_OF_MEMORY = 0.5


@dataclass(frozen=True)
class Seconds:
    """Of a request, or of a part of it."""

    layers: Sequence[float]  # every layer
    total: float  # the dense model
    product: float  # of the stream with a C x C matrix


def request_seconds(
    config: Config, source: Checkpoint, architecture: Architecture
) -> dict[str, Seconds]:
    """Of a whole request, by the name of ``""``, of its ``prefill`` and of its ``decode``.

    By models of random weights that generate in turns as ``bench-serving`` lets them: a whole one,
    or as many of its layers as there is room for, and for each kind of layers one with half as many
    of them. What these are faster by is the time of the layers.
    """
    device = open_device(config.engine.device)
    dtype = compute_dtype(config, source, device)
    sizes, of_kind = model_sizes(source, architecture, dtype), dict[str, list[int]]()
    for number, layer in enumerate(sizes.layers):
        of_kind.setdefault(layer.kind, []).append(number)
    room = _SHARE_OF_MEMORY * free_bytes(device) / (1 + len(of_kind))
    room -= sizes.below_bytes + sizes.head_bytes

    def first(count: int) -> set[int]:
        return {layer for layers in of_kind.values() for layer in layers[:count]}

    count = len(sizes.layers)
    while sum(sizes.layers[layer].loaded_bytes for layer in first(count)) > room:
        count -= 1
        if count < 2:
            raise ConfigError(
                "selection.target=speedup is measured on two layers of each kind at least, and "
                f"they do not fit on {device}. Give selection.remove."
            )
    gone = {kind: layers[:count][1::2] or layers[:1] for kind, layers in of_kind.items()}
    models = {
        kind: _of_layers(source, architecture, first(count) - {*without}, dtype, device)
        for kind, without in {"": [], **gone}.items()
    }
    length = min(PROMPT, source.config.get("max_position_embeddings", math.inf) - _TIMED_NEW)
    ids_BT = torch.zeros(BATCH, length, dtype=torch.int64, device=device)
    turns = take_turns(models, ids_BT, _TIMED_NEW, _ROUNDS)
    width = architecture.hidden_size
    weight_CC = random_tensor((width, width), dtype, device)
    streams = [random_tensor((rows, width), dtype, device) for rows in (BATCH * length, BATCH)]
    prefill_s, step_s = (timed(lambda x=x: x @ weight_CC, device) for x in streams)  # type: ignore[misc]
    models.clear()
    gc.collect()
    release_cached(device)  # what is free there decides which engine the run gets
    product = Turn(prefill_s, (_TIMED_NEW - 1) * step_s, ids_BT, None)

    def of_part(part: str) -> Seconds:
        total = _seconds(turns[""], part)
        layer_s = {
            kind: (total - _seconds(turns[kind], part)) / len(without)
            for kind, without in gone.items()
        }
        layers = tuple(layer_s[layer.kind] for layer in sizes.layers)
        absent = set(range(len(layers))) - first(count)
        total += math.fsum(layers[layer] for layer in absent)
        return Seconds(layers, total, _seconds([product], part))

    return {part: of_part(part) for part in ("", "prefill", "decode")}


def _of_layers(
    source: Checkpoint,
    architecture: Architecture,
    layers: Collection[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    whole = architecture.num_layers
    others = (Span(layer, layer + 1) for layer in range(whole) if layer not in layers)
    gone = check_spans(others, whole)
    config = read_config(cut_config(source.config, gone, architecture.fields))
    return random_model(architecture.causal_lm_class, config, dtype, device)


def _seconds(turns: Sequence[Turn], part: str) -> float:
    """Of a request of so many new tokens as ``bench-serving`` asks for, or of a part of it.

    The fastest turn counts: whatever else the machine does only adds to it.
    """
    prefill_s = min(turn.prefill_s for turn in turns)
    decode_s = min(turn.decode_s for turn in turns) * (NEW - 1) / (_TIMED_NEW - 1)
    return {"": prefill_s + decode_s, "prefill": prefill_s, "decode": decode_s}[part]
