"""Texts continued greedily: how each model answers, and whether it still generates.

Perplexity sees one token behind text of people. Behind its own tokens a model may repeat itself, or
be another one soon, which a person who talks to it sees first.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from ghost_dist.calibration.windows import TokenWindows

PROMPT_TOKENS, NEW_TOKENS, MOST_TEXTS, MOST_PROMPTS = 24, 32, 3, 12
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # not tabs and line ends
_GRAM = 4  # tokens that were there before are a repetition


def prompts(corpora: Mapping[str, TokenWindows]) -> list[tuple[str, torch.Tensor]]:
    """Beginnings of windows that are spread over the first corpora, int64, (T,), of one length.

    The first windows of all corpora come first.
    """
    first = list(corpora.items())[:MOST_TEXTS]
    length = min([PROMPT_TOKENS, *(windows.window_length // 2 for _, windows in first)])
    each = MOST_PROMPTS // max(1, len(first))
    return [
        (name, torch.from_numpy(window.astype("int64")))
        for number in range(each)
        for name, windows in first
        if number < windows.num_windows
        for window in [windows.tokens[number * windows.num_windows // each, :length]]
    ]


@torch.inference_mode()
def continued(model: Any, prompts_BT: torch.Tensor) -> torch.Tensor:
    """What the model says behind each prompt, (B, new), by transformers' own ``generate``."""
    before, new = model.generation_config, NEW_TOKENS
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None:
        new = max(1, min(new, most - prompts_BT.shape[1]))
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    try:
        ids_BT = prompts_BT.to(model.device)
        found = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=True)
    finally:
        model.generation_config = before
    said_BT: torch.Tensor = found[:, prompts_BT.shape[1] :].cpu()
    return said_BT


def printable(text: str) -> str:
    """Without control characters, which would act on a terminal and are errors in a page."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def generation(said: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Of greedy continuations (B, new) by model, ``dense`` among them, means over the prompts.

    ``same``: tokens, from the first on, that are the dense model's; ``repeated``: share of the runs
    of 4 tokens that the same continuation has had before.
    """
    dense_BT = said["dense"]
    return {
        "prompts": len(dense_BT),
        "tokens": dense_BT.shape[1],
        **{
            model: {
                "same": float((ids_BT == dense_BT).cumprod(1).sum(1).double().mean()),
                "repeated": _repeated(ids_BT),
            }
            for model, ids_BT in said.items()
        },
    }


def _repeated(ids_BT: torch.Tensor) -> float:
    shares = []
    for ids in ids_BT.tolist():
        grams = [tuple(ids[at : at + _GRAM]) for at in range(len(ids) - _GRAM + 1)]
        shares.append(1 - len(set(grams)) / max(1, len(grams)))
    return sum(shares) / len(shares)
