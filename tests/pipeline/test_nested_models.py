"""Language models that the files hold under other names, or beside a vision tower: taken by
themselves, and exported as what plain transformers loads."""

import json

import pytest
import torch
import transformers
from families import HIDDEN, NUM_LAYERS, TEXT, VOCAB, random_tokens, save_tokenizer
from safetensors.torch import load_file

import ghost_dist
from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.checkpoint.reader import open_checkpoint

LM = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 32, "intermediate_size": 32}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def gemma3():
    tower = {**VISION, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.Gemma3Config(
        text_config={**LM, "sliding_window": 8, "query_pre_attn_scalar": 16},
        vision_config={**tower, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )


def qwen3_5():
    return transformers.Qwen3_5Config(
        text_config={**LM, **DELTA},
        vision_config={**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": HIDDEN},
    )


def llava():
    tower = {**VISION, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**LM, tie_word_embeddings=False),
        vision_config=transformers.CLIPVisionConfig(**tower, image_size=28, patch_size=14),
    )


def nemotron_h():
    return transformers.NemotronHConfig(
        **LM,
        hybrid_override_pattern="M--*M-",
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
    )


def save(config, folder):
    torch.manual_seed(0)
    several = transformers.AutoModelForImageTextToText
    auto = several if hasattr(config, "text_config") else transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def text_of_qwen3_5(folder):
    """The text model as transformers saves it once it was loaded from the whole."""
    save(qwen3_5(), folder / "whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "whole")
    model.save_pretrained(folder / "text")
    save_tokenizer(folder / "text")
    return folder / "text"


MAKE = {
    "gemma3": lambda folder: save(gemma3(), folder),
    "qwen3_5": lambda folder: save(qwen3_5(), folder),
    "llava": lambda folder: save(llava(), folder),
    "qwen3_5_text": text_of_qwen3_5,
    "nemotron_h": lambda folder: save(nemotron_h(), folder),
}
"""What saves a checkpoint, by what it is."""

CLASSES = {
    "gemma3": "Gemma3ForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "llava": "LlamaForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
}
LEFT_OUT = {"gemma3": "vision_tower", "qwen3_5": "visual", "llava": "vision_tower"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = MAKE[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.parametrize("name", MAKE)
def test_the_language_model_computes_what_the_whole_computes(folders, name):
    source = open_checkpoint(folders(name))
    assert source.config["architectures"] == [CLASSES[name]]
    several = transformers.AutoModelForImageTextToText
    auto = several if name in LEFT_OUT else transformers.AutoModelForCausalLM
    whole = auto.from_pretrained(folders(name), dtype=torch.float32).eval()
    alone = load_causal_lm(folders(name), dtype=torch.float32, device=torch.device("cpu"))
    assert type(alone).__name__ == CLASSES[name]
    with torch.inference_mode():
        logits = [model(random_tokens()).logits for model in (whole, alone)]
    assert torch.equal(*logits)
    assert (LEFT_OUT[name] in " ".join(source.notes)) if name in LEFT_OUT else not source.notes


@pytest.mark.parametrize("kind", ["resident", "streaming"])
@pytest.mark.parametrize("name", MAKE)
def test_recovered_and_exported_as_text_only(folders, make_config, tmp_path, name, kind):
    """That transformers loads the export in a fresh process, with equal logits, the run checks."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    run = ghost_dist.recover(
        make_config(
            model__path=str(folders(name)),
            calibration__source=str(text),
            calibration__windows=8,
            calibration__window_length=32,
            selection__spans=[[1, 3]],  # the attention layer of a hybrid stays
            engine__kind=kind,
            # a plain checkpoint of the family, and one with code of its own
            operator__name="none" if kind == "resident" else "ghost",
        ),
        progress=False,
    )
    config = json.loads((run.checkpoint / "config.json").read_text())
    assert not [key for key in config if "vision" in key or key == "text_config"]
    assert config["num_hidden_layers"] == NUM_LAYERS - 2
    model = run.load_model()
    assert type(model).__name__ == "Ghost" * (kind == "streaming") + CLASSES[name]
    exported = load_file(run.checkpoint / "model.safetensors")
    assert not [tensor for tensor in exported if "vis" in tensor or "projector" in tensor]
