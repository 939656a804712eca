"""Which tensors of the files a model needs, and how transformers makes its parameters of them."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ghost_dist.devices import has_gpu
from ghost_dist.errors import CheckpointError

if TYPE_CHECKING:
    from ghost_dist.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Place:
    """Where a tensor of the files goes."""

    target: str  # in the model; of several the first one's
    pattern: str | None  # of the conversion that merges or splits it; None: as it is
    converter: Any


def places(model: Any, names: Iterable[str], *, merged: bool = True) -> dict[str, Place]:
    """Where transformers would put tensors of these names; ``merged=False``: before merging."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if merged and isinstance(entry, WeightConverter)]
    converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        found[name] = Place(target, pattern, converter_of.get(pattern))
    return found


def renamed(model: Any, checkpoint: Checkpoint) -> dict[str, Place]:
    """Tensors of the files that a model needs, by name in the files."""
    state = model.state_dict()
    found = places(model, checkpoint.tensors)
    return {name: place for name, place in found.items() if place.target in state}


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

    ``tensors`` are by name in the files, or objects that give one for ``[...]``. ``one_by_one``:
    read each when its turn comes, instead of all of them ahead by threads. Returns the names of
    the model's tensors that got nothing; a misshapen one is an error.
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
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_loading())
        if one_by_one:  # ahead, experts and what they are merged into would be held at once
            stack.enter_context(environment("HF_DEACTIVATE_ASYNC_LOAD", "1"))
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), settings)
    for target, got, expected in sorted(info.mismatched_keys):
        raise CheckpointError(
            f"{_made_of(model, checkpoint, target)} gives {target} the shape {list(got)}, expected "
            f"{list(expected)}. config.json and the files disagree: correct config.json, or "
            "download or copy the checkpoint again."
        )
    for target, problem in sorted(info.conversion_errors.items()):
        reason = " ".join(problem.splitlines()[-2:])  # above them a traceback
        raise CheckpointError(
            f"{_made_of(model, checkpoint, target)} cannot become {target}: {reason}. A tensor is "
            "missing or has another shape than the others: download or copy the checkpoint again."
        )
    missing: set[str] = info.missing_keys
    return missing


@contextlib.contextmanager
def quiet_loading() -> Iterator[list[str]]:
    """No progress bars, no load report: those go to the list that is yielded."""
    logger = transformers.utils.logging.get_logger("transformers.modeling_utils")
    bars = transformers.utils.logging.is_progress_bar_enabled()
    reports: list[str] = []

    def keep_report(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "LOAD REPORT" in message:
            reports.append(re.sub(r"\x1b\[[0-9;]*m", "", message))
            return False
        return True

    logger.addFilter(keep_report)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield reports
    finally:
        logger.removeFilter(keep_report)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def save_model(model: Any, folder: Path) -> None:
    # It imports DeepSpeed where that is installed, which warns if it has to find out by itself
    # that there is no GPU.
    tell = not has_gpu() and "DS_ACCELERATOR" not in os.environ
    told = environment("DS_ACCELERATOR", "cpu") if tell else contextlib.nullcontext()
    with told, quiet_loading():
        model.save_pretrained(folder)


def _made_of(model: Any, checkpoint: Checkpoint, target: str) -> str:
    """The tensors that a parameter is made of, for a message."""
    names = [n for n, place in renamed(model, checkpoint).items() if place.target == target]
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    first = checkpoint.tensors[names[0]]
    return f"{checkpoint.path / first.file}: tensor {first.name}{more}"


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
