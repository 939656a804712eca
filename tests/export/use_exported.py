"""What a user without ghost_dist does with exported folders; run by test_use.py in a fresh process.

Argument: a folder with exported checkpoints. Writes ``results.json`` there: per folder, the check
and what it measured, or the exception.
"""

import json
import sys
import traceback
from pathlib import Path

sys.modules["ghost_dist"] = None

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
TOKENS = torch.arange(3, 27).repeat(2, 1)


def load(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **arguments)


def logits(model, tokens=TOKENS):
    with torch.inference_mode():
        return model(tokens.to(model.device), use_cache=False).logits.float()


def difference(a, b):
    return float((a.float() - b.float()).abs().max())


def cached_generation(folder, scratch):
    """Whether generate gives the same tokens with and without a key-value cache."""
    model = load(folder)
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(TOKENS[:1], use_cache=True, **arguments)
    without = model.generate(TOKENS[:1], use_cache=False, **arguments)
    return bool(torch.equal(with_cache, without)) and with_cache.shape[1] == 36


def saved_again(folder, scratch):
    """Difference after save_pretrained and another load."""
    model = load(folder)
    model.save_pretrained(scratch)
    assert list(scratch.glob("modeling_ghost_*.py")), "the code was not saved along"
    return difference(logits(load(scratch)), logits(model))


def base_model(folder, scratch):
    """Difference of AutoModel's last hidden state from that of the causal LM's base model."""
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model = load(folder)
    inner = getattr(model, model.base_model_prefix)
    with torch.inference_mode():
        return difference(base(TOKENS)[0], inner(TOKENS)[0])


def gradient_checkpointing(folder, scratch):
    """Difference of the operator's gradient with and without checkpointing."""
    model = load(folder)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(0)  # for families with dropout
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(TOKENS, use_cache=False).logits.square().mean().backward()
        name, weight = next((n, p) for n, p in model.named_parameters() if ".ghost." in n)
        assert weight.grad.abs().max() > 0, name
        grads.append(weight.grad.clone())
    return difference(*grads)


def compiled(folder, scratch):
    """Difference of the compiled model, in one graph, from the eager one."""
    model = load(folder)
    torch._dynamo.reset()
    graph = torch.compile(model, backend="aot_eager", fullgraph=True)
    return difference(logits(graph), logits(model))


def split(folder, scratch):
    """Difference with the layers on CPU and on disk by turns (accelerate's hooks in place)."""
    model = load(folder)
    names = [
        n for n, _ in model.named_modules() if n.count(".") == 2 and n.split(".")[-1].isdigit()
    ]
    if not names:
        names = [n for n, _ in model.named_modules() if n.split(".")[-1].isdigit()]
    placed = {name: ("disk" if i % 2 else "cpu") for i, name in enumerate(names)}
    base, parent = model.base_model_prefix, names[0].rpartition(".")[0].rpartition(".")[0]
    for owner in dict.fromkeys(("", base, parent)):
        children = model.get_submodule(owner).named_children()
        for child, _ in children:
            path = f"{owner}.{child}".strip(".")
            if not any(n == path or n.startswith(path + ".") for n in names):
                placed[path] = "disk" if "norm" in child or child == "ln_f" else "cpu"
    offloaded = load(folder, device_map=placed, offload_folder=scratch)
    return difference(logits(offloaded), logits(model))


def operator_dtypes(folder, scratch):
    """Dtypes of operators and of the other weights, loaded as bfloat16."""
    model = load(folder, dtype=torch.bfloat16)
    dtypes = {"ghost": set(), "rest": set()}
    for name, parameter in model.named_parameters():
        dtypes["ghost" if ".ghost." in name else "rest"].add(str(parameter.dtype))
    assert torch.isfinite(logits(model)).all()
    return {kind: sorted(found) for kind, found in dtypes.items()}


def tokenizer(folder, scratch):
    """Class and ids of the tokenizer."""
    found = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return [type(found).__name__, found("some text to be split")["input_ids"]]


def without_trust(folder, scratch):
    """What happens when code from checkpoints is not allowed."""
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        return str(error)
    return "loaded"


CHECKS = {
    check.__name__: check
    for check in (
        cached_generation,
        saved_again,
        base_model,
        gradient_checkpointing,
        compiled,
        split,
        operator_dtypes,
        tokenizer,
        without_trust,
    )
}


def main(folder, wanted):
    results = {}
    for name, checks in json.loads(wanted).items():
        results[name] = {}
        for check in checks:
            scratch = folder / "scratch" / name / check
            scratch.mkdir(parents=True)
            try:
                results[name][check] = CHECKS[check](folder / name, scratch)
            except Exception:
                results[name][check] = traceback.format_exc()
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
