"""What a user without ghost_dist does with exported folders; run by test_use.py in a fresh process.

Argument: a folder with exported checkpoints. Writes ``results.json`` there: per folder, the check
and what it measured, or the exception.
"""

import json
import re
import sys
import traceback
import warnings
from pathlib import Path

sys.modules["ghost_dist"] = None

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate import init_empty_weights  # noqa: E402
from transformers import (  # noqa: E402
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.masking_utils import eager_mask  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
TOKENS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def load(folder, **arguments):
    """The model; nothing may be missing from the files, or be left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **arguments
    )
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    return model


def logits(model, tokens=TOKENS):
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits.float()


def difference(a, b):
    return float((a.float() - b.float()).abs().max())


def reloaded(folder, scratch):
    """Writes the logits to compare; whether generate gives the same tokens without a cache."""
    model = load(folder)
    with torch.inference_mode():
        rows = [model(row[None], use_cache=False).logits for row in TOKENS]
    np.save(folder / "logits.npy", torch.cat(rows).numpy())
    arguments = {**GREEDY, "max_new_tokens": 5}
    with_cache = model.generate(TOKENS[:1], use_cache=True, **arguments)
    without = model.generate(TOKENS[:1], use_cache=False, **arguments)
    return bool(torch.equal(with_cache, without)) and with_cache.shape[1] == TOKENS.shape[1] + 5


def static_cache(folder, scratch):
    """Whether a cache of fixed size gives the same tokens."""
    model = load(folder)
    arguments = {**GREEDY, "max_new_tokens": 5}
    expected = model.generate(TOKENS[:1], **arguments)
    found = model.generate(TOKENS[:1], cache_implementation="static", **arguments)
    return bool(torch.equal(found, expected))


def left_padded(folder, scratch):
    """Whether a batch of prompts of several lengths gives what each gives by itself."""
    model = load(folder)
    prompts = [TOKENS[0], TOKENS[1, :17], TOKENS[1, :3]]
    longest = len(prompts[0])
    padded = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    arguments = {**GREEDY, "max_new_tokens": 6}
    together = model.generate(padded, attention_mask=mask, **arguments)[:, longest:]
    alone = [model.generate(p[None], **arguments)[0, len(p) :] for p in prompts]
    return bool(torch.equal(together, torch.stack(alone)))


def assisted(folder, scratch):
    """Whether drafts of another model leave greedy tokens as they are."""
    model = load(folder)
    drafts = load(folder)
    with torch.no_grad():
        drafts.get_output_embeddings().weight[::2] += 0.3  # right sometimes
    arguments = {**GREEDY, "max_new_tokens": 8}
    expected = model.generate(TOKENS[:1], **arguments)
    return bool(
        torch.equal(model.generate(TOKENS[:1], assistant_model=drafts, **arguments), expected)
    )


def placed(folder, scratch):
    """Largest difference when accelerate is asked where to put the model."""
    model = load(folder)
    return max(
        difference(logits(load(folder, device_map=where, offload_folder=scratch)), logits(model))
        for where in ("auto", "cpu", {"": "disk"})
    )


def lora(folder, scratch):
    """One step of training adapters on the operators and elsewhere, merged and saved.

    What the step changed, and the difference of the merged model, loaded again, from the trained.
    """
    from peft import LoraConfig, get_peft_model

    before = logits(load(folder))
    config = LoraConfig(target_modules=["q_proj", "ghost.linear"], r=4, lora_dropout=0.0)
    model = get_peft_model(load(folder), config)
    adapted = [n for n, p in model.named_parameters() if p.requires_grad and ".ghost." in n]
    assert adapted, "no adapter on an operator"
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(2):  # the second factor starts at zero, so the first moves in the second step
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n in adapted)
    trained = logits(model.eval())
    model.merge_and_unload().save_pretrained(scratch)
    return [difference(trained, before), difference(logits(load(scratch)), trained)]


def text_pipeline(folder, scratch):
    """The tokens of a text-generation pipeline, and generate's."""
    words = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    pipe = transformers.pipeline(
        "text-generation", str(folder), tokenizer=words, trust_remote_code=True
    )
    text = "some text to be split"
    found = pipe(text, return_tensors=True, max_new_tokens=5, **GREEDY)
    tokens = torch.tensor([words(text)["input_ids"]])
    expected = load(folder).generate(tokens, max_new_tokens=5, **GREEDY)[0]
    return [found[0]["generated_token_ids"], expected.tolist()]


def quantised(folder, scratch):
    """Relative difference with every linear module quantised to int8, the operator among them."""
    model = load(folder)
    before = logits(model)
    with warnings.catch_warnings(action="ignore"):  # deprecated, but the one that torch carries
        small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    found = [m for n, m in small.named_modules() if n.endswith("ghost.linear")]
    assert found, "no operator"
    assert not any(isinstance(m, torch.nn.Linear) for m in found), "not quantised"
    return difference(logits(small), before) / float(before.abs().max())


def as_a_backend(folder, scratch):
    """What vLLM's Transformers backend does: no head, its attention, names that it replaces.

    The layers whose attention was called and the difference of the last hidden state.
    """
    calls = []

    def attention(module, *args, counted=None, **kwargs):
        calls.append(module.layer_idx)
        assert counted == "passed down", "arguments of the call did not reach the attention"
        family = sys.modules[type(module).__module__]
        return family.eager_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("ours", attention)
    AttentionMaskInterface.register("ours", eager_mask)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    architecture = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(architecture).is_backend_compatible()
    inner = getattr(architecture, architecture.base_model_prefix)
    with torch.device("cpu"), init_empty_weights():  # as vLLM: a device, yet no storage
        model = AutoModel.from_config(
            config, trust_remote_code=True, attn_implementation="ours"
        ).eval()
    assert all(p.is_meta for p in model.parameters())
    assert model.supports_pp_plan
    plain = [n for n, m in model.named_modules() if type(m) is torch.nn.LayerNorm]
    assert not any(hasattr(model.get_submodule(name), "ghost") for name in plain)
    operators = [n for n, m in model.named_modules() if n.rpartition(".")[0].endswith("ghost")]
    for pattern in model.tp_plan:  # vLLM takes them for regular expressions
        sharded = [name for name in operators if re.match(pattern, name)]
        assert not sharded, f"{pattern} would deal out {sharded}"
    model.load_state_dict(inner.state_dict(), assign=True)
    positions = torch.arange(TOKENS.shape[1])[None]
    arguments = {"position_ids": positions, "use_cache": False, "return_dict": False}
    with torch.inference_mode():
        found = model(TOKENS[:1], counted="passed down", **arguments)[0]
        expected = inner(TOKENS[:1], **arguments)[0]
    return [calls, difference(found, expected)]


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
        reloaded,
        static_cache,
        left_padded,
        assisted,
        placed,
        lora,
        text_pipeline,
        quantised,
        as_a_backend,
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
