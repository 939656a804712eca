"""The layout of DeciLM, read by the rules of llama.cpp's converter and graph."""

import json

import pytest
import torch
import transformers
from families import random_tokens, rounding
from safetensors.torch import load_file
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.surgery import insert_operators, remove_layers
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.find_halves import with_halves
from ghost_dist.errors import ConfigError
from ghost_dist.export.deci import export_deci
from ghost_dist.export.rewrite import export_checkpoint
from ghost_dist.spans import Span, parse_sublayers

WIDTH, LAYERS, EPS = 32, 8, 1e-5
TOKENS = random_tokens()
VARIANTS = {
    # Gaps in the middle, at layer 0, behind the last layer; an attention and an MLP off.
    "operators": ((Span(0, 1), Span(3, 5), Span(7, 8)), "attention:2,mlp:6"),
    # The layer behind the gap has no attention, or no MLP.
    "behind": ((Span(1, 2), Span(4, 5)), "attention:2,mlp:5,attention:7"),
    "no operator": ((), "attention:1,mlp:3,attention:7"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Function from fields of the configuration to a random Llama's folder."""

    def make(**fields):
        torch.manual_seed(0)
        usual = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
        config = transformers.LlamaConfig(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            vocab_size=128,
            rms_norm_eps=EPS,
            tie_word_embeddings=True,
            **{**usual, **fields},
        )
        model = transformers.LlamaForCausalLM(config)
        for name, weight in model.named_parameters():
            scale = 1 + 0.3 * torch.randn_like(weight) if "norm" in name else weight * 5
            weight.data.copy_(scale)
        folder = tmp_path_factory.mktemp("llama")
        model.save_pretrained(folder, max_shard_size="100KB")
        return folder

    return make


def exported(folder, spans, sublayers, out, part="norm_weight_CC"):
    """Export without layers and halves, with a random operator at each gap; the same in memory."""
    source = open_checkpoint(folder)
    architecture = with_halves(source, inspect_architecture(source))
    draw = torch.Generator().manual_seed(1)
    matrices = {span: torch.randn(WIDTH, WIDTH, generator=draw) for span in spans}
    operators = {span: Repair(**{part: m}, norm_eps=EPS) for span, m in matrices.items()}
    variant = Variant(spans, operators, sublayers=parse_sublayers(sublayers) if sublayers else ())
    export_checkpoint(source, architecture, variant, out, max_shard_bytes=100_000)
    model = load_causal_lm(folder, dtype=torch.float32, device=torch.device("cpu"))
    remove_layers(model, architecture, spans)
    insert_operators(model, architecture, variant)
    return model


class Linear(nn.Module):
    """llama.cpp's "linear attention": one matrix."""

    def __init__(self):
        super().__init__()
        self.linear_attn = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden_states, **_):
        return self.linear_attn(hidden_states), None


class NoAttention(nn.Module):
    def forward(self, hidden_states, **_):
        return torch.zeros_like(hidden_states), None


def as_llama_cpp(folder):
    """The model that llama.cpp makes of a folder, and how many heads its first layer has."""
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("architectures") == ["DeciLMForCausalLM"]
    assert config.pop("model_type") == "nemotron-nas"
    blocks = config.pop("block_configs")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    for layer, block in zip(model.model.layers, blocks, strict=True):
        ffn_mult, group = block["ffn"]["ffn_mult"], block["attention"]["n_heads_in_group"]
        assert isinstance(ffn_mult, float)  # the converter asks for that
        width = int(2 * ffn_mult * WIDTH / 3)
        inner = width if width % 256 == 0 else width + 256 - width % 256
        assert inner > 0, "llama.cpp leaves out the attention, too"
        layer.mlp = LlamaMLP(transformers.LlamaConfig(**{**config, "intermediate_size": inner}))
        if group is not None:
            assert config["num_attention_heads"] // group == config["num_key_value_heads"]
        elif block["attention"]["replace_with_linear"]:
            layer.self_attn = Linear()
        else:
            layer.self_attn, layer.input_layernorm = NoAttention(), nn.Identity()
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)
    return model, blocks


@pytest.mark.parametrize("name", VARIANTS)
def test_llama_cpp_would_compute_what_the_checkpoint_does(llama, tmp_path, name):
    expected = exported(llama(), *VARIANTS[name], tmp_path / "checkpoint")
    export_deci(tmp_path / "checkpoint", tmp_path / "deci")
    model, blocks = as_llama_cpp(tmp_path / "deci")
    with torch.inference_mode():
        logits, wanted = model(TOKENS).logits, expected(TOKENS, use_cache=False).logits
    assert (logits - wanted).abs().max() <= rounding(wanted)
    # An operator before a layer without attention takes its place, any other adds a layer.
    linear = [n for n, block in enumerate(blocks) if block["attention"]["replace_with_linear"]]
    assert (linear, len(blocks)) == {
        "operators": ([0, 3, 6], 7), "behind": ([1, 3], 7), "no operator": ([], 8),
    }[name]  # fmt: skip


def test_what_the_layout_cannot_say_is_refused(llama, tmp_path):
    gap = (Span(2, 3),)

    def refused(message, *arguments, **fields):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        exported(llama(**fields), *arguments[:2], out, *arguments[2:])
        with pytest.raises(ConfigError, match=message):
            export_deci(out, tmp_path / "deci")
        assert not (tmp_path / "deci").exists()

    refused("an operator other than norm-linear", gap, "", "weight_CC")
    refused("layer 0 has no attention", gap, "attention:0")
    refused("400 wide, no multiple of 256", gap, "", intermediate_size=400)
    refused("head_dim is not 8", gap, "", head_dim=16)
    refused("rope_type is linear", gap, "", rope_parameters={
        "rope_type": "linear", "factor": 2.0, "rope_theta": 1e4,
    })  # fmt: skip
    refused("it has biases", gap, "", attention_bias=True)
    plain = llama(head_dim=16)  # of another family nothing else is said
    with pytest.raises(ConfigError, match=r"model_type is llama\. That"):
        export_deci(plain, tmp_path / "deci")
    (tmp_path / "deci").mkdir()
    with pytest.raises(ConfigError, match=r"deci exists\. Give a folder"):
        export_deci(plain, tmp_path / "deci")
