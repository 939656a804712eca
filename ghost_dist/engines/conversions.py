"""Which tensors of the files a model needs, and how transformers makes its parameters of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.errors import CheckpointError


def convert_and_load(
    model: Any,
    checkpoint: Checkpoint,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    *,
    one_by_one: bool = True,
) -> set[str]:
    """Let transformers put tensors of the files in their place, renamed and merged as it does.

    Parameters
    ----------
    model
        A transformers model; only what the tensors make is changed.
    checkpoint
        For messages.
    tensors
        By name in the files; tensors, or objects that give one for ``[...]``.
    dtype, device
        Of the parameters afterwards; what the family keeps in float32 stays float32.
    one_by_one
        Read each when its turn comes, instead of all of them ahead by threads.

    Returns
    -------
    set
        Names of the model's tensors that got nothing.

    Raises
    ------
    CheckpointError
        If a tensor is misshapen or cannot be converted; the message names it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    settings = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": device},
        weight_mapping=get_model_conversion_mapping(model),
    )
    with _one_by_one() if one_by_one else contextlib.nullcontext():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), settings)
    for name, got, expected in sorted(info.mismatched_keys):
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name} has the shape {tuple(got)} here instead of "
            f"{tuple(expected)}. config.json and the files disagree; download them again."
        )
    for name, problem in sorted(info.conversion_errors.items()):
        raise CheckpointError(f"{checkpoint.path}: tensor {name} cannot be converted: {problem}")
    missing: set[str] = info.missing_keys
    return missing


def renamed(model: Any, checkpoint: Checkpoint) -> dict[str, tuple[str, str | None, Any]]:
    """Tensors of the files that a model needs, by name in the files.

    Each with its name in the model, the pattern of the conversion that merges it (None: it stays
    as it is), and that conversion.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    found: dict[str, tuple[str, str | None, Any]] = {}
    for key in checkpoint.tensors:
        target, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        if target in state:
            converter = next((c for c in converters if pattern in c.source_patterns), None)
            found[key] = (target, pattern, converter)
    return found


@contextlib.contextmanager
def _one_by_one() -> Iterator[None]:
    """Read each tensor when its turn comes, instead of all of them ahead by threads.

    Ahead, the experts' own tensors and what they are merged into would be held at once.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
