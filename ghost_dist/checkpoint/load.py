"""Models with weights, and tokenizers.

transformers reads the files. That they hold the model was found before (``tensor_check.py``); here
a tensor that holds NaN is an error, since it would spoil every sum.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ghost_dist.checkpoint.architecture import Architecture, causal_lm_class, why_not
from ghost_dist.checkpoint.conversions import quiet_loading
from ghost_dist.checkpoint.layer_fields import cut_config, read_config
from ghost_dist.checkpoint.reader import Checkpoint, lazy_tensors, open_checkpoint
from ghost_dist.errors import CheckpointError
from ghost_dist.spans import Span

_CHECKED_AT_ONCE = 1 << 24
_TOKENIZER_FILES = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


def truncated_config(checkpoint: Checkpoint, architecture: Architecture, num_layers: int) -> Any:
    """The transformers configuration of the first ``num_layers`` layers, or of a few more.

    Some families (Gemma 4, whose last layer always attends to all tokens) have none of certain
    numbers of layers. The surplus is to be deleted once the model is built.
    """
    assert 0 < num_layers <= architecture.num_layers, "no such boundary"
    whole = architecture.num_layers
    cuts = [(Span(kept, whole),) for kept in range(num_layers, whole)]
    above = next((cut for cut in cuts if why_not(architecture, checkpoint.config, cut) is None), ())
    return read_config(cut_config(checkpoint.config, above, architecture.fields))


def load_causal_lm(path: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    config = read_config(open_checkpoint(path).config)
    return load_model(causal_lm_class(config), path, dtype, device, config)


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder; CheckpointError if there is none that can be read."""
    try:
        if not any(any(path.glob(pattern)) for pattern in _TOKENIZER_FILES):
            raise FileNotFoundError("none of its files is there")
        with quiet_loading():
            return transformers.AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:
        raise CheckpointError(
            f"{path} has no tokenizer that can be read: {error}. Copy tokenizer.json and "
            "tokenizer_config.json of the model into the folder."
        ) from error


def load_model(
    model_class: Any, path: Path, dtype: torch.dtype, device: torch.device, config: Any
) -> Any:
    arguments: dict[str, Any] = {"config": config}
    if device.type != "cpu":
        arguments["device_map"] = {"": device}
    source: Path | None = path
    checkpoint = open_checkpoint(path)
    reports: list[str] = []
    try:
        with contextlib.ExitStack() as files, quiet_loading() as reports:
            if not checkpoint.as_in_files:
                # transformers knows FP8, but takes every block for 128 x 128 of whole ones.
                tensors = lazy_tensors(checkpoint, checkpoint.tensors, files, device)
                arguments["state_dict"] = tensors
                source = None
            model = model_class.from_pretrained(
                source, dtype=dtype, use_safetensors=True, local_files_only=True, **arguments
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise CheckpointError(
            "\n".join((f"{path} cannot be loaded by transformers: {error}", *reports))
        ) from error
    check_finite(path, model, dtype)
    return model.requires_grad_(False).eval()


def check_finite(path: Path, model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        rows = parameter.detach() if parameter.ndim else parameter.detach()[None]
        # Piece by piece: isfinite makes two copies, which for embeddings are gigabytes.
        pieces = rows.chunk(1 + rows.numel() // _CHECKED_AT_ONCE)
        if not all(bool(torch.isfinite(piece).all()) for piece in pieces):
            raise non_finite_weight(path, name, dtype)


def non_finite_weight(path: Path, name: str, dtype: torch.dtype) -> CheckpointError:
    """The error for a tensor that holds NaN or Inf in the dtype of the computation."""
    return CheckpointError(
        f"{path}: tensor {name} holds NaN or Inf as {str(dtype).removeprefix('torch.')}. "
        "If the checkpoint has a wider dtype its numbers may overflow: try "
        "model.dtype=bfloat16 or float32. Else download or copy it again."
    )
