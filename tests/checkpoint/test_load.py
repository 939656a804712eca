"""Loaded models against plain transformers, and weights that must not be used."""

import json
import logging
import shutil

import pytest
import torch
import transformers
from all_families import small_config
from families import FAMILIES, NUM_LAYERS, random_tokens, save_checkpoint
from safetensors.torch import load_file, save_file

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.load import load_causal_lm, load_tokenizer
from ghost_dist.checkpoint.reader import INDEX, open_checkpoint
from ghost_dist.engines.resident import load_decoder
from ghost_dist.errors import CheckpointError, UnsupportedArchitectureError

CPU = torch.device("cpu")


def hidden_states(folder, layers):
    """Boundaries 0 .. L of the whole model; the last is the last layer's output, not normed."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    last = []
    model.get_submodule(layers)[-1].register_forward_hook(lambda *call: last.append(call[-1]))
    with torch.inference_mode():
        states = model(random_tokens(), output_hidden_states=True, use_cache=False).hidden_states
    return [*states[:-1], last[0][0] if isinstance(last[0], tuple) else last[0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_boundary_is_that_of_the_whole_model(checkpoint, family):
    source, architecture = checkpoint(family)
    expected = hidden_states(source.path, architecture.layers)
    for boundary in (1, 2, 5, NUM_LAYERS):
        decoder = load_decoder(
            source.path, architecture, num_layers=boundary, dtype=torch.float32, device=CPU
        )
        assert len(decoder.layers) == decoder.num_layers == boundary
        taken = {}

        def take(module, args, kwargs, taken=taken, decoder=decoder):
            index = list(decoder.layers).index(module)
            taken[index] = args[0] if args else kwargs["hidden_states"]

        for layer in decoder.layers:
            layer.register_forward_pre_hook(take, with_kwargs=True)
        with torch.inference_mode():
            taken[boundary] = decoder.model(random_tokens())[0]
        for index, stream in taken.items():
            assert torch.equal(stream, expected[index]), index


@pytest.mark.parametrize("family", ["gemma4_text", "gpt_neox_japanese", "mamba", "glm_moe_dsa"])
def test_boundaries_of_families_whose_last_layer_is_another(tmp_path, family):
    """The first four layers are no model of the first two; GLM hands on what nobody uses."""
    torch.manual_seed(0)
    config = small_config(family, initializer_range=0.08)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    source = open_checkpoint(tmp_path)
    architecture = inspect_architecture(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    taken = []
    model.get_submodule(architecture.layers)[4].register_forward_pre_hook(
        lambda _, args, kwargs: taken.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    decoder = load_decoder(tmp_path, architecture, num_layers=4, dtype=torch.float32, device=CPU)
    with torch.inference_mode():
        model(random_tokens(), use_cache=False)
        stream_BTC = decoder.model(random_tokens())[0]
    assert torch.equal(stream_BTC, taken[0])
    assert decoder.num_layers == len(decoder.layers) == 4


def test_layers_that_hand_on_more_than_the_stream_are_refused(tmp_path):
    """Routers of ZAYA take what the router before them made of its input."""
    transformers.AutoModelForCausalLM.from_config(small_config("zaya")).save_pretrained(tmp_path)
    architecture = inspect_architecture(open_checkpoint(tmp_path))
    with pytest.raises(UnsupportedArchitectureError, match=r"zaya.*something besides the residual"):
        load_decoder(tmp_path, architecture, num_layers=4, dtype=torch.float32, device=CPU)


def test_only_the_layers_below_are_held(checkpoint):
    source, architecture = checkpoint("llama")
    decoder = load_decoder(
        source.path, architecture, num_layers=2, dtype=torch.bfloat16, device=CPU
    )
    names = [name for name, _ in decoder.model.named_parameters()]
    assert not any("lm_head" in n or n.startswith(("norm", "layers.2")) for n in names)
    assert {p.dtype for p in decoder.model.parameters()} == {torch.bfloat16} == {decoder.dtype}


def test_quiet_but_not_deaf(checkpoint, capfd, caplog):
    source, architecture = checkpoint("mixtral")
    before = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.enable_progress_bar()
    try:
        load_decoder(source.path, architecture, num_layers=2, dtype=torch.float32, device=CPU)
        assert transformers.utils.logging.is_progress_bar_enabled()
    finally:
        if not before:
            transformers.utils.logging.disable_progress_bar()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    logging.getLogger("transformers.modeling_utils").warning("something real")
    assert "something real" in caplog.text


@pytest.fixture
def folder(tmp_path):
    return save_checkpoint("llama", tmp_path / "llama", max_shard_size="1GB")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_not_finite(checkpoint, folder, name, value):
    rewrite(folder, lambda t: t[name].view(-1)[-1:].fill_(value))
    _, architecture = checkpoint("llama")
    short = name.removeprefix("model.")
    with pytest.raises(CheckpointError, match=f"{short} holds NaN or Inf"):
        load_decoder(folder, architecture, num_layers=3, dtype=torch.float32, device=CPU)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or Inf"):
        load_causal_lm(folder, dtype=torch.float32, device=CPU)


def test_damage_above_the_last_boundary_is_not_read(checkpoint, folder):
    rewrite(folder, lambda t: t["model.layers.4.mlp.down_proj.weight"].fill_(float("nan")))
    _, architecture = checkpoint("llama")
    load_decoder(folder, architecture, num_layers=4, dtype=torch.float32, device=CPU)


def test_overflow_in_a_narrower_dtype(folder):
    rewrite(folder, lambda t: t["model.layers.1.mlp.down_proj.weight"].fill_(1e6))
    load_causal_lm(folder, dtype=torch.float32, device=CPU)
    with pytest.raises(CheckpointError, match="as float16"):
        load_causal_lm(folder, dtype=torch.float16, device=CPU)


def test_tied_embeddings(checkpoint):
    source, _ = checkpoint("qwen3")
    assert "lm_head.weight" not in source.tensors
    model = load_causal_lm(source.path, dtype=torch.float32, device=CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_code_in_a_checkpoint_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    auto_map = {
        "AutoConfig": "evil.LlamaConfig",
        "AutoModelForCausalLM": "evil.LlamaForCausalLM",
        "AutoTokenizer": "evil.T",
    }
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    (folder / "evil.py").write_text("raise SystemExit('this ran')")
    load_causal_lm(folder, dtype=torch.float32, device=CPU)


def test_tokenizer_that_is_not_there(folder):
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(folder)


def test_shard_that_vanishes_between_opening_and_loading(checkpoint, tmp_path):
    source, architecture = checkpoint("llama")
    copied = shutil.copytree(source.path, tmp_path / "copy")
    index = json.loads((copied / INDEX).read_text())["weight_map"]
    (copied / index["model.layers.0.mlp.down_proj.weight"]).unlink()
    with pytest.raises(CheckpointError):
        load_decoder(copied, architecture, num_layers=2, dtype=torch.float32, device=CPU)
