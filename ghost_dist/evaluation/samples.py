"""A few texts continued greedily, so that a person sees how a model answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from ghost_dist.calibration.windows import TokenWindows

PROMPT_TOKENS, NEW_TOKENS, MOST_TEXTS = 24, 32, 3


def prompts(corpora: Mapping[str, TokenWindows]) -> dict[str, torch.Tensor]:
    """Beginnings of the first window of the first corpora, int64, (T,); all of one length."""
    first = list(corpora.items())[:MOST_TEXTS]
    length = min((windows.window_length // 2 for _, windows in first), default=0)
    return {
        name: torch.from_numpy(windows.tokens[0, : min(length, PROMPT_TOKENS)].astype("int64"))
        for name, windows in first
    }


@torch.inference_mode()
def continued(model: Any, prompts_BT: torch.Tensor) -> torch.Tensor:
    """What the model says behind each prompt, (B, new), by transformers' own ``generate``."""
    before = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    try:
        ids_BT = prompts_BT.to(model.device)
        found = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=True)
    finally:
        model.generation_config = before
    new: torch.Tensor = found[:, prompts_BT.shape[1] :].cpu()
    return new
