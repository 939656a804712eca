"""Run by ``verify.py`` in a process of its own: load a checkpoint and use it.

Imports torch and transformers only and makes ghost_dist unimportable, so that what it loads is what
a user without ghost_dist would load. Argument: JSON with ``search_path``, ``num_threads`` and
``device`` (or null). Standard input, once all is imported: JSON with ``folder``, ``results`` (a
folder to write into), ``trust_remote_code`` and what is asked for: ``model`` (``tokens``: .npy,
int64, ``dtype``, ``device``; or null), ``texts`` for the tokenizer (or null).
"""

import json
import sys
from typing import Any

NEW_TOKENS = 4
PROMPT_TOKENS = 32


def main(argument: str) -> None:
    """Do what the request asks for."""
    start = json.loads(argument)
    sys.path[:] = start["search_path"]
    sys.modules["ghost_dist"] = None  # type: ignore[assignment]

    import torch
    import transformers

    # All that takes long before the request comes; these two are half of it.
    import transformers.generation
    import transformers.modeling_utils

    _ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    torch.set_num_threads(start["num_threads"])
    if start["device"] is not None:
        torch.empty(1, device=start["device"])
    content = sys.stdin.read()
    if not content:
        return  # whoever started this needs no check any more
    request = json.loads(content)
    transformers.utils.logging.disable_progress_bar()
    if request["texts"] is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            request["folder"], trust_remote_code=request["trust_remote_code"], local_files_only=True
        )
        with open(request["results"] + "/token_ids.json", "w", encoding="utf-8") as file:
            json.dump(token_ids(tokenizer, request["texts"]), file)
    if request["model"] is not None:
        use_model(request, **request["model"])


def use_model(request: dict[str, Any], tokens: str, dtype: str, device: str) -> None:
    """Write the logits of all windows, and what ``generate`` makes of the first one's beginning."""
    import numpy as np
    import torch
    import transformers

    where = torch.device(device)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        request["folder"],
        dtype=getattr(torch, dtype),
        device_map=None if where.type == "cpu" else {"": where},
        trust_remote_code=request["trust_remote_code"],
        local_files_only=True,
        output_loading_info=True,
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise SystemExit(
            f"missing tensors {sorted(info['missing_keys'])}, "
            f"unexpected tensors {sorted(info['unexpected_keys'])}"
        )
    windows = torch.from_numpy(np.load(tokens)).to(where)
    with torch.inference_mode():
        rows = [model(row[None], use_cache=False).logits.float() for row in windows]
        np.save(request["results"] + "/logits.npy", torch.cat(rows).cpu().numpy())
        prompt, new = generate(model, windows)
        ids = torch.cat([prompt, new], 1)[:, :-1]
        uncached = model(ids, use_cache=False).logits[0, prompt.shape[1] - 1 :].float()
    np.save(request["results"] + "/generated.npy", new[0].cpu().numpy())
    np.save(request["results"] + "/uncached.npy", uncached.cpu().numpy())


def generate(model: Any, windows: Any) -> tuple[Any, Any]:
    """The first window's beginning and the greedy tokens behind it, with a cache; (1, n) each."""
    import torch
    import transformers

    # Penalties and sampling of generation_config.json would hide what the model itself says.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
    )
    prompt = windows[:1, :PROMPT_TOKENS]
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True)
    return prompt, ids[:, prompt.shape[1] :]


def token_ids(tokenizer: Any, texts: list[str]) -> list[list[Any]]:
    """Ids of texts, with special tokens and without, and of a chat: pairs of text and ids."""
    chat = [{"role": "user", "content": " 12 cats "}]
    try:
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # there is no template, or this program of the author's refuses
        prompt = f"({type(error).__name__} of the chat template)"
    return [
        [text, list(tokenizer(text, add_special_tokens=special)["input_ids"])]
        for text in [*texts, prompt]
        for special in (True, False)
    ]


if __name__ == "__main__":
    main(sys.argv[1])
