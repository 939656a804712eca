"""Whether the tensors of the files are those of the model, before any of them is read.

transformers' own loading is run on tensors without storage, so its renamings, merges and exceptions
decide. What it would only warn about is an error: a parameter without a tensor is random numbers,
and a tensor without a parameter is a part of the model that is not computed.
"""

from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ghost_dist.checkpoint.conversions import Place, convert_and_load, places
from ghost_dist.checkpoint.reader import DTYPES, FLOATS, Checkpoint
from ghost_dist.errors import CheckpointError

_SHOWN = 3


def check_tensors(
    checkpoint: Checkpoint, model: Any, is_further: Callable[[str], bool]
) -> tuple[dict[str, Place], frozenset[str]]:
    """Compare the headers with the model; no tensor is read, its parameters become equal ones.

    Returns the place of every tensor that the model takes, by name in the files, and the tensors
    that are left out on purpose: further-token prediction (``is_further``), and what transformers
    lists as such, for example buffers that are computed today.
    """
    state = model.state_dict()
    found = places(model, checkpoint.tensors)
    taken = {name: place for name, place in found.items() if place.target in state}
    _check_dtypes(checkpoint, taken, state)
    shapes = {
        name: torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
        for name, info in checkpoint.tensors.items()
        if name in taken
    }
    missing = convert_and_load(model, checkpoint, shapes, checkpoint.dtype, torch.device("meta"))
    for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
        if source not in missing:
            missing.discard(tied)
    left = {n: p.target for n, p in found.items() if n not in taken and not is_further(p.target)}
    info = SimpleNamespace(missing_keys=missing, unexpected_keys=set(left.values()))
    model._adjust_missing_and_unexpected_keys(info)
    extra = [name for name, target in left.items() if target in info.unexpected_keys]
    if extra or info.missing_keys:
        raise _unfit(checkpoint, type(model).__name__, state, extra, info.missing_keys)
    return taken, frozenset(found.keys() - taken.keys())


def _check_dtypes(
    checkpoint: Checkpoint, taken: Mapping[str, Place], state: Mapping[str, Tensor]
) -> None:
    for name, place in taken.items():
        info = checkpoint.tensors[name]
        allowed = FLOATS if state[place.target].is_floating_point() else DTYPES
        if info.dtype not in allowed and name not in checkpoint.scales:
            raise CheckpointError(
                f"{checkpoint.path / info.file}: tensor {name} is {info.dtype}, expected one of "
                f"{', '.join(allowed)}, or F8_E4M3 with its scales. Quantised weights are not "
                "read: give the checkpoint in bfloat16."
            )


def _unfit(
    checkpoint: Checkpoint,
    model_class: str,
    state: Mapping[str, Tensor],
    extra: Collection[str],
    missing: Collection[str],
) -> CheckpointError:
    problems = []
    if missing:
        listed = [f"{name} {list(state[name].shape)}" for name in sorted(missing)]
        problems.append(f"{len(listed)} parameters have no tensor ({_shown(listed)})")
    if extra:
        tensors = [checkpoint.tensors[name] for name in sorted(extra)]
        listed = [f"{t.name} {t.dtype} {list(t.shape)} in {t.file}" for t in tensors]
        problems.append(f"{len(listed)} tensors have no parameter ({_shown(listed)})")
    return CheckpointError(
        f"{checkpoint.path}: the files do not hold the {model_class} of config.json: "
        f"{'; '.join(problems)}. Nothing is drawn at random or left out in silence: download or "
        "copy the checkpoint again, or correct config.json (tie_word_embeddings, attention_bias, "
        "num_hidden_layers, ...). Tensors that mean nothing to the model go by "
        "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
    )


def _shown(listed: list[str]) -> str:
    return ", ".join(listed[:_SHOWN]) + (", ..." if len(listed) > _SHOWN else "")
