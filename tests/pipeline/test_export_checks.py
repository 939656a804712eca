"""Checkpoints as users have them: what is exported is used by a fresh process before "done".

Each is recovered resident and streaming; each holds several of the kinds that reports described.
"""

import json

import pytest
import torch
import transformers
from all_families import small_config
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from ghost_dist.api import make_config
from ghost_dist.calibration.windows import load_windows
from ghost_dist.errors import UnsupportedArchitectureError
from ghost_dist.pipeline.recover import recover
from ghost_dist.planning.plan import plan_run

TEXT = "The quick brown fox jumps over 12 lazy dogs; it was 1999.\n"
ENGINES = ("resident", "streaming")
TRIMMING = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"


def save_model(folder, family, **fields):
    """Random weights, and a tokenizer of bytes whose named class would merge "12"."""
    torch.manual_seed(0)
    config = small_config(family, vocab_size=264, initializer_range=0.08, **fields)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocabulary = {
        token: i + 4 for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    vocabulary |= {"<pad>": 0, "<s>": 1, "</s>": 2, "12": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("1", "2")]))
    tokenizer.decoder = decoders.ByteLevel()
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TRIMMING}
    content = {"tokenizer_class": "GPT2Tokenizer", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def configuration(model, out, spans, engine, source, **settings):
    return make_config(
        model,
        out=out,
        spans=spans,
        settings={
            **settings,
            "calibration.source": str(source),
            "calibration.sampling": "beginning",
            "calibration.windows": 8,
            "calibration.window_length": 64,
            "operator.choose": "residual",
            "engine.device": "cpu",
            "engine.kind": engine,
        },
    )


def reloaded(folder):
    """Logits of a few tokens, and whether ``generate`` says the same with a cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.arange(4, 28)[None]
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(tokens, use_cache=True, **arguments)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **arguments))
    return model


@pytest.mark.parametrize("engine", ENGINES)
def test_chats_in_a_json_array_and_a_tokenizer_that_the_family_chooses(tmp_path, engine):
    """A family whose first layer alone is dense, cut in the middle."""
    model = save_model(tmp_path / "ernie", "ernie4_5_moe")
    part = {"type": "text", "text": TEXT}
    rows = [{"messages": [{"role": "user", "content": [part, part]}]}] * 20
    chats = tmp_path / "chats.json"
    chats.write_text(json.dumps(rows, indent=1))
    run = tmp_path / "run"
    recover(configuration(model, run, [(2, 4)], engine, chats))

    original = transformers.AutoTokenizer.from_pretrained(model)
    tokens = load_windows(run / "tokens.safetensors").tokens
    expected = original(f"user: {(TEXT + TEXT).strip()}\n")["input_ids"]
    assert tokens[0].tolist() == expected[: len(tokens[0])]
    found = transformers.AutoTokenizer.from_pretrained(run / "checkpoint", trust_remote_code=True)
    digits = [original.convert_tokens_to_ids(digit) for digit in "12"]
    assert original("12 cats")["input_ids"][:2] == digits  # GPT2Tokenizer: 3
    for text in ("12 cats", "  12", "<s>12</s> <s>", "user: 12\n"):
        assert found(text)["input_ids"] == original(text)["input_ids"]
    layers = reloaded(run / "checkpoint").model.layers
    assert [hasattr(layer.mlp, "experts") for layer in layers] == [False, True, True, True]


@pytest.mark.parametrize("engine", ENGINES)
def test_pattern_beside_explicit_layer_types(tmp_path, engine):
    types = ["sliding_attention"] * 3 + ["full_attention"] * 3
    model = save_model(
        tmp_path / "exaone4", "exaone4", sliding_window_pattern="LLLG", layer_types=types
    )
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    recover(configuration(model, tmp_path / "run", [(2, 4)], engine, text))
    found = reloaded(tmp_path / "run" / "checkpoint")
    assert found.config.layer_types == types[:2] + types[4:]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("family", "spans"), [("lfm2_moe", [(1, 2), (3, 4), (5, 6)]), ("qwen3_next", [(1, 2), (3, 6)])]
)
def test_cut_that_leaves_nothing_to_count_tokens(tmp_path, family, spans, engine):
    """``generate`` would raise: refused before any work, by ``plan`` as well."""
    model = save_model(tmp_path / family, family)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    config = configuration(model, tmp_path / "run", spans, engine, text)
    for work in (plan_run, recover):
        with pytest.raises(UnsupportedArchitectureError, match=f"{family}.*no attention layer"):
            work(config)
    assert not (tmp_path / "run" / "statistics.zarr").exists()


def test_layers_that_a_criterion_chose_are_judged_as_well(tmp_path):
    """DiffLlama's layers know their numbers: only the last ones can go, and these are protected."""
    model = save_model(tmp_path / "diffllama", "diffllama")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    chosen = {"selection.remove": 2, "selection.protect": [4, 5]}
    chosen |= {"selection.criterion": "paper"}
    config = configuration(model, tmp_path / "run", None, "resident", text, **chosen)
    for refuses in (plan_run, recover):
        with pytest.raises(UnsupportedArchitectureError, match="diffllama.*lambda_init"):
            refuses(config)
    assert not (tmp_path / "run" / "statistics.zarr").exists()
