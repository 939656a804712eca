"""Which families are understood, what a cut makes of their configuration, and what is refused."""

import dataclasses
import json

import pytest
import torch
import transformers
from all_families import small_config
from families import CUTS, FAMILIES, NUM_LAYERS, VOCAB, save_checkpoint

from ghost_dist.checkpoint.architecture import check_cut, check_some_cut, inspect_architecture
from ghost_dist.checkpoint.layer_fields import cut_config, read_config
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
    config = cut_config(source.config, CUTS[cut], architecture.fields)
    assert json.dumps(source.config) == before
    check_cut(architecture, source.config, CUTS[cut])
    kept = kept_layers(CUTS[cut], NUM_LAYERS)
    read = read_config(config)
    assert read.num_hidden_layers == len(kept)
    types = getattr(FAMILIES[family](), "layer_types", None)
    if types is not None:
        assert list(read.layer_types) == [types[layer] for layer in kept]
    _, *per_layer = vars(architecture.fields).values()
    untouched = set(source.config) - {name for names in per_layer for name in names}
    assert all(config[name] == source.config[name] for name in untouched)


def test_known_fields(checkpoint):
    """Values worked out by hand for the cut [1, 2), [3, 5): layers 0, 2, 5 stay."""
    spans = CUTS["two"]
    source, architecture = checkpoint("qwen3_moe")  # sparse step 2, layer 3 dense: sparse are 1, 5
    config = cut_config(source.config, spans, architecture.fields)
    assert (config["mlp_only_layers"], config["decoder_sparse_step"]) == ([0, 1], 1)
    source, architecture = checkpoint("deepseek_v3")  # the first two are dense
    assert cut_config(source.config, spans, architecture.fields)["first_k_dense_replace"] == 1
    source, architecture = checkpoint("qwen2")  # sliding from layer 3 on
    config = cut_config(source.config, spans, architecture.fields)
    assert config["max_window_layers"] == 2
    assert config["layer_types"] == ["full_attention", "full_attention", "sliding_attention"]
    source, architecture = checkpoint("gpt2")
    config = cut_config(source.config, spans, architecture.fields)
    assert config["n_layer"] == 3
    assert "num_hidden_layers" not in config
    source, architecture = checkpoint("smollm3")  # no rotary embedding in layers 2 and 5
    assert cut_config(source.config, spans, architecture.fields)["no_rope_layers"] == [1, 0, 0]
    source, architecture = checkpoint("gemma3")
    assert "sliding_window_pattern" not in cut_config(source.config, spans, architecture.fields)


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
        (transformers.Qwen2_5_VLConfig, "other modalities"),
        (
            lambda: transformers.Gemma3nTextConfig(**SMALL, num_kv_shared_layers=2),
            "keys and values of earlier",
        ),
        (
            lambda: transformers.GPT2Config(n_layer=2, scale_attn_by_inverse_layer_idx=True),
            "layer's number",
        ),
    ],
    ids=["t5", "bert", "vit", "qwen2_5_vl", "gemma3n", "gpt2-scaled"],
)
def test_refused_by_name(tmp_path, make, reason):
    config = make()
    source = _saved(config, tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=reason) as error:
        inspect_architecture(source)
    assert config.model_type in str(error.value)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Function from family and fields to (Checkpoint, Architecture)."""

    def make(family, **fields):
        folder = tmp_path_factory.mktemp(family)
        config = small_config(family, **fields)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        source = open_checkpoint(folder)
        return source, inspect_architecture(source)

    return make


MIDDLE, FIRST, LAST = (Span(2, 4),), (Span(0, 1),), (Span(4, 6),)


@pytest.mark.parametrize(
    ("family", "fields", "spans", "expected"),
    [
        (  # a pattern that its layer_types make a mere description
            "exaone4",
            {
                "sliding_window_pattern": "LLLG",
                "layer_types": [*["sliding_attention"] * 3, *["full_attention"] * 3],
            },
            MIDDLE,
            {"layer_types": [*["sliding_attention"] * 2, *["full_attention"] * 2]},
        ),
        ("ernie4_5_moe", {"moe_layer_start_index": 3}, MIDDLE, {"moe_layer_start_index": 2}),
        ("ernie4_5_moe", {}, FIRST, {"moe_layer_start_index": 0}),
        (
            "gpt_neo",
            {},
            FIRST,
            {"attention_layers": ["local", "global", "local", "global", "local"]},
        ),
        (
            "recurrent_gemma",
            {},
            MIDDLE,
            {"block_types": ["recurrent", "recurrent", "recurrent", "attention"]},
        ),
        ("gemma4_text", {}, MIDDLE, {"per_layer_config": {"3": {"head_dim": 512}}}),
        ("minicpm3", {}, MIDDLE, {"scale_depth": pytest.approx(1.4 * (4 / 6) ** 0.5)}),
        ("xlstm", {}, MIDDLE, {"num_blocks": 4, "num_hidden_layers": 4}),
        ("granite_swa", {}, MIDDLE, {"num_hidden_layers": 4}),  # a second list holds no weights
        ("llama4_text", {}, MIDDLE, {"num_hidden_layers": 4}),  # its base has another name
        ("modernbert-decoder", {}, MIDDLE, {"num_hidden_layers": 4}),
        ("diffllama", {}, LAST, {"num_hidden_layers": 4}),
    ],
)
def test_the_requested_cut_decides(small, family, fields, spans, expected):
    source, architecture = small(family, **fields)
    check_cut(architecture, source.config, spans)
    cut = cut_config(source.config, spans, architecture.fields)
    assert {name: cut[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("family", "spans", "reason"),
    [
        ("modernbert-decoder", FIRST, "LayerNorm becomes Identity"),
        ("diffllama", MIDDLE, "lambda_init"),
        ("jamba", MIDDLE, "cannot express"),
        ("minimax", MIDDLE, "num_hidden_layers=6"),  # it decays by the layer's number of all
        ("lfm2_moe", (Span(1, 2), Span(3, 4), Span(5, 6)), "no attention layer is left.* cache"),
        ("qwen3_next", (Span(1, 2), Span(3, 4), Span(5, 6)), "no attention layer is left.* cache"),
    ],
)
def test_cuts_that_are_refused(small, family, spans, reason):
    source, architecture = small(family)
    with pytest.raises(UnsupportedArchitectureError, match=f"{family}.*{reason}.*Remove other lay"):
        check_cut(architecture, source.config, spans)


def test_a_number_of_layers_is_refused_where_no_span_of_it_can_go(small):
    source, architecture = small("diffllama")
    every = [(Span(start, start + 2),) for start in range(5)]
    check_some_cut(architecture, source.config, every)
    with pytest.raises(UnsupportedArchitectureError, match="lambda_init"):
        check_some_cut(architecture, source.config, every[:-1])


def test_refusals_that_config_json_decides(tmp_path):
    folder = save_checkpoint("llama", tmp_path / "m")
    quantised = {"quant_method": "fp8"}
    with pytest.raises(UnsupportedArchitectureError, match=r"is quantised \(fp8\)"):
        inspect_architecture(edited(folder, quantization_config=quantised))
    own_code = {"AutoConfig": "configuration_x.XConfig"}
    changes = {"quantization_config": None, "model_type": "unheard_of", "auto_map": own_code}
    (folder / "configuration_x.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(UnsupportedArchitectureError, match="unheard_of.*comes with.*never run"):
        inspect_architecture(edited(folder, **changes))
    with pytest.raises(CheckpointError, match="not a valid llama configuration"):
        inspect_architecture(edited(folder, model_type="llama", auto_map=None, hidden_size="a"))


def test_checkpoint_with_fewer_layers_than_its_config(tmp_path):
    folder = save_checkpoint("llama", tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"\(model\.layers\.6\.input_layernorm"):
        inspect_architecture(edited(folder, num_hidden_layers=8))


def test_adjacent_and_edge_spans_of_tiny_models(tmp_path):
    config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    source = open_checkpoint(tmp_path)
    check_cut(inspect_architecture(source), source.config, (Span(1, 2),))
