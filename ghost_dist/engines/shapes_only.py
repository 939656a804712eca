"""Models without weights: parameters on the meta device, buffers real."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def shapes_only(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model in evaluation mode without storage; its buffers, in no file, are real, on the CPU."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = model_class._from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def restore_buffers(model: nn.Module, buffers: Mapping[str, Tensor], device: torch.device) -> None:
    """Put buffers by name on a device, in their own dtype."""
    for name, buffer in buffers.items():
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = buffer.to(device)
