"""Which families are understood, what a cut makes of their configuration, and what is refused."""

import dataclasses
import json

import pytest
import torch
import transformers
from families import CUTS, FAMILIES, NUM_LAYERS, VOCAB, save_checkpoint

from ghost_dist.checkpoint.architecture import check_cut, cut_config, inspect_architecture
from ghost_dist.checkpoint.layer_fields import read_config
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.errors import CheckpointError, UnsupportedArchitectureError
from ghost_dist.spans import Span, kept_layers

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
    "head_dim": 16,
    "pad_token_id": 0,
}


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return open_checkpoint(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_found(checkpoint, family):
    source, found = checkpoint(family)
    assert (found.num_layers, found.hidden_size, found.vocab_size) == (NUM_LAYERS, 64, VOCAB)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    assert len(model.get_submodule(found.layers)) == NUM_LAYERS
    assert model.get_submodule(found.embeddings) is model.get_input_embeddings()
    assert model.get_submodule(found.head) is model.get_output_embeddings()
    assert "norm" in type(model.get_submodule(found.final_norm)).__name__.lower()
    assert any(name.startswith(f"{found.tensor_prefix}.0.") for name in source.tensors)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_config_describes_the_layers_that_stay(checkpoint, family, cut):
    source, architecture = checkpoint(family)
    before = json.dumps(source.config)
    config = cut_config(source.config, CUTS[cut], architecture)
    assert json.dumps(source.config) == before
    check_cut(architecture, source.config, CUTS[cut])
    kept = kept_layers(CUTS[cut], NUM_LAYERS)
    read = read_config(type(FAMILIES[family]()), config)
    assert read.num_hidden_layers == len(kept)
    types = getattr(FAMILIES[family](), "layer_types", None)
    if types is not None:
        assert list(read.layer_types) == [types[layer] for layer in kept]
    untouched = set(source.config) - set(architecture.per_layer_fields)
    assert all(config[name] == source.config[name] for name in untouched)


def test_known_fields(checkpoint):
    """Values worked out by hand for the cut [1, 2), [3, 5): layers 0, 2, 5 stay."""
    spans = CUTS["two"]
    source, architecture = checkpoint("qwen3_moe")  # sparse step 2, layer 3 dense: sparse are 1, 5
    config = cut_config(source.config, spans, architecture)
    assert (config["mlp_only_layers"], config["decoder_sparse_step"]) == ([0, 1], 1)
    source, architecture = checkpoint("deepseek_v3")  # the first two are dense
    assert cut_config(source.config, spans, architecture)["first_k_dense_replace"] == 1
    source, architecture = checkpoint("qwen2")  # sliding from layer 3 on
    config = cut_config(source.config, spans, architecture)
    assert config["max_window_layers"] == 2
    assert config["layer_types"] == ["full_attention", "full_attention", "sliding_attention"]
    source, architecture = checkpoint("gpt2")
    config = cut_config(source.config, spans, architecture)
    assert config["n_layer"] == 3
    assert "num_hidden_layers" not in config
    source, architecture = checkpoint("smollm3")  # no rotary embedding in layers 2 and 5
    assert cut_config(source.config, spans, architecture)["no_rope_layers"] == [1, 0, 0]
    source, architecture = checkpoint("gemma3")
    assert "sliding_window_pattern" not in cut_config(source.config, spans, architecture)


def test_a_pattern_that_is_not_cut_is_found(checkpoint):
    """What check_cut is for: without its layer_types Gemma 3 would slide at other layers."""
    source, architecture = checkpoint("gemma3")
    fields = dataclasses.replace(architecture.fields, lists={}, removed=())
    blind = dataclasses.replace(architecture, fields=fields)
    config = {k: v for k, v in source.config.items() if k != "layer_types"}
    with pytest.raises(UnsupportedArchitectureError, match="sliding"):
        check_cut(blind, {**config, "sliding_window_pattern": 3}, CUTS["middle"])


def _saved(config, folder, **changes):
    config.save_pretrained(folder)
    weights = {"model.layers.0.x": torch.zeros(1)}
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors")
    return edited(folder, **changes)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: transformers.T5Config(num_layers=2), "encoder-decoder"),
        (lambda: transformers.BertConfig(num_hidden_layers=2), "norm behind the layers"),
        (lambda: transformers.ViTConfig(num_hidden_layers=2), "no causal language model"),
        (transformers.Gemma3Config, "other modalities"),
        (
            lambda: transformers.Gemma3nTextConfig(**SMALL, num_kv_shared_layers=2),
            "keys and values of earlier",
        ),
        (
            lambda: transformers.GPT2Config(n_layer=2, scale_attn_by_inverse_layer_idx=True),
            "layer's number",
        ),
        (
            lambda: transformers.JambaConfig(**{**SMALL, "num_hidden_layers": 8}),
            "cannot express|is not the one list|not supported",
        ),
        (lambda: transformers.DiffLlamaConfig(**SMALL), "lambda_init"),
    ],
    ids=["t5", "bert", "vit", "gemma3-multimodal", "gemma3n", "gpt2-scaled", "jamba", "diffllama"],
)
def test_refused_by_name(tmp_path, make, reason):
    config = make()
    source = _saved(config, tmp_path)
    layers = range(getattr(config, "num_hidden_layers", 1) or 1)
    tensors = {f"model.layers.{i}.x": next(iter(source.tensors.values())) for i in layers}
    source = dataclasses.replace(source, tensors=tensors)
    with pytest.raises(UnsupportedArchitectureError, match=reason) as error:
        inspect_architecture(source)
    assert config.model_type in str(error.value)


def test_refusals_that_config_json_decides(tmp_path):
    folder = save_checkpoint("llama", tmp_path / "m")
    quantised = {"quant_method": "fp8"}
    with pytest.raises(UnsupportedArchitectureError, match=r"llama.*quantised \(fp8\)"):
        inspect_architecture(edited(folder, quantization_config=quantised))
    own_code = {"AutoConfig": "configuration_x.XConfig"}
    changes = {"quantization_config": None, "model_type": "unheard_of", "auto_map": own_code}
    (folder / "configuration_x.py").write_text("raise SystemExit('this ran')")
    for trust in (False, True):
        with pytest.raises(UnsupportedArchitectureError, match="unheard_of.*code comes with"):
            inspect_architecture(edited(folder, **changes), trust_remote_code=trust)
    with pytest.raises(CheckpointError, match="not a valid llama configuration"):
        inspect_architecture(edited(folder, model_type="llama", auto_map=None, hidden_size="a"))


def test_checkpoint_with_fewer_layers_than_its_config(tmp_path):
    folder = save_checkpoint("llama", tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"no tensors model\.layers\.6\."):
        inspect_architecture(edited(folder, num_hidden_layers=8))


def test_adjacent_and_edge_spans_of_tiny_models(tmp_path):
    """Two layers are enough for the trial cuts."""
    config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    source = open_checkpoint(tmp_path)
    check_cut(inspect_architecture(source), source.config, (Span(1, 2),))
