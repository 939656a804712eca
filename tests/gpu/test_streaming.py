"""Layer streaming on a GPU: the same bits as the resident engine, wherever the streams live."""

import numpy as np
import pytest
import torch
import transformers
from families import NUM_LAYERS, VOCAB, save_checkpoint
from recording import Recorder, saved_at_once

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.engines import expert_parts, offloaded_rows
from ghost_dist.engines.memory import Residency
from ghost_dist.engines.offloaded import OffloadedModel
from ghost_dist.engines.offloaded_rows import OffloadedEngine, prove_offloaded
from ghost_dist.engines.resident import ResidentEngine, load_decoder
from ghost_dist.errors import CheckpointError
from ghost_dist.statistics.stream_state import StreamState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

CUDA = torch.device("cuda:0")
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (6, 32), dtype=np.int32)


@pytest.fixture(params=["llama", "mixtral", "gemma2", "deepseek_v3"])
def opened(request, tmp_path):
    source = open_checkpoint(save_checkpoint(request.param, tmp_path / "model", torch.bfloat16))
    architecture = inspect_architecture(source)
    prove_offloaded(source.path, CUDA)
    return source, architecture


def stream(opened, state=None, experts="auto", **options):
    source, architecture = opened
    engine = OffloadedEngine(
        OffloadedModel(
            source,
            architecture,
            num_layers=NUM_LAYERS,
            dtype=torch.bfloat16,
            device=CUDA,
            **options,
        ),
        2,
    )
    engine.model.hold(experts, batch_tokens=64, tokens=TOKENS.size)
    mlp = tuple(sorted(architecture.down_projections))[:1]
    recorder = Recorder((0, 3, NUM_LAYERS), mlp)
    rows = engine.sweep(
        TOKENS, range(6), recorder.boundaries, mlp, lambda _: saved_at_once(state), state
    )
    rows.feed(range(6), recorder, CUDA)
    engine.model.close()
    return rows, recorder


def resident(opened):
    source, architecture = opened
    decoder = load_decoder(
        source.path, architecture, num_layers=NUM_LAYERS, dtype=torch.bfloat16, device=CUDA
    )
    mlp = tuple(sorted(architecture.down_projections))[:1]
    recorder = Recorder((0, 3, NUM_LAYERS), mlp)
    ResidentEngine(decoder, 2).run(TOKENS, range(6), recorder, lambda _: None)
    return recorder


@pytest.mark.parametrize("place", ["device", "host"])
def test_streams_and_rows_are_bitwise_the_resident_ones(opened, place, monkeypatch, tmp_path):
    if place == "host":
        monkeypatch.setattr(offloaded_rows, "free_bytes", lambda _: 0)
    state = StreamState(tmp_path / "state", "same", range(6))
    rows, got = stream(opened, state)
    state.close()
    kind = "cuda" if place == "device" else "cpu"
    assert {tensor.device.type for tensor in rows.tensors.values()} == {kind}
    expected = resident(opened)
    assert all(torch.equal(got.streams[key], s) for key, s in expected.streams.items())
    for key, parts in expected.mlp.items():
        assert all(map(torch.equal, got.mlp[key], parts)), key
    saved = StreamState(tmp_path / "state", "same", range(6)).load()
    for name, tensor in rows.tensors.items():
        assert torch.equal(saved.rows[name], tensor.cpu()), name


def test_nan_in_a_weight_is_named_one_layer_late(opened):
    from safetensors.torch import load_file, save_file

    source, architecture = opened
    name = next(n for n in source.tensors if "layers.3.self_attn.o_proj.weight" in n)
    path = source.path / source.tensors[name].file
    tensors = load_file(path)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.3.self_attn.o_proj.weight holds NaN"):
        stream((open_checkpoint(source.path), architecture))


# torch 2.11 warns of itself when its compiler is imported.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_layers_differ_by_rounding_only(tmp_path):
    source = open_checkpoint(save_checkpoint("llama", tmp_path / "model", torch.bfloat16))
    architecture = inspect_architecture(source)
    prove_offloaded(source.path, CUDA)
    opened = source, architecture
    plain, compiled = resident(opened), stream(opened, compiled=True)[1]
    for key, expected in plain.streams.items():
        difference = (compiled.streams[key] - expected).float().norm() / expected.float().norm()
        assert difference < 0.02, key
    assert all(
        torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05)
        for key in plain.mlp
        for a, b in zip(plain.mlp[key], compiled.mlp[key], strict=True)
    )


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_in_parts_give_the_bits_of_whole_layers(
    tmp_path, monkeypatch, family, experts, place
):
    """With what they are asked and answer on the device, and in page-locked host memory."""
    source = open_checkpoint(save_checkpoint(family, tmp_path / "model", torch.bfloat16))
    architecture = inspect_architecture(source)
    prove_offloaded(source.path, CUDA, experts)
    if place == "host":
        monkeypatch.setattr(offloaded_rows, "free_bytes", lambda _: 0)
        monkeypatch.setattr(expert_parts, "free_or_cached_bytes", lambda _: 0)
    places, run_part = set(), expert_parts.SplitLayer._run_part

    def watched(self, part, batch):
        places.update((batch.hidden_NC.device.type, batch.products_SC.device.type))
        run_part(self, part, batch)

    monkeypatch.setattr(expert_parts.SplitLayer, "_run_part", watched)
    got = stream((source, architecture), experts=experts)[1]
    assert places == {"cuda" if place == "device" else "cpu"}
    expected = resident((source, architecture))
    for key, whole in expected.streams.items():
        assert torch.equal(got.streams[key], whole), key
    for key, parts in expected.mlp.items():
        assert all(map(torch.equal, got.mlp[key], parts)), key


def test_experts_in_parts_take_less_than_one_layer(tmp_path):
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=4,
        moe_intermediate_size=512,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    architecture = inspect_architecture(source)
    prove_offloaded(source.path, CUDA, 3)
    peaks = {}
    for experts in (64, 4):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with OffloadedModel(
            source, architecture, num_layers=3, dtype=torch.bfloat16, device=CUDA
        ) as model:
            engine = OffloadedEngine(model, 2)
            engine.model.hold(experts, batch_tokens=64, tokens=TOKENS.size)
            engine.sweep(TOKENS, range(6), (3,), (), lambda _: None)
        peaks[experts] = torch.cuda.max_memory_allocated() - before
    assert peaks[64] > 2 * layer
    assert peaks[4] < layer / 2


def test_layers_one_at_a_time_need_the_memory_of_one(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    architecture = inspect_architecture(source)
    prove_offloaded(source.path, CUDA)
    peaks, found = {}, {}
    for layers in (2, 1):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with OffloadedModel(
            source, architecture, num_layers=4, dtype=torch.bfloat16, device=CUDA
        ) as model:
            engine = OffloadedEngine(model, 2)
            free = int((layers + 0.5) * layer / 0.85)
            held = engine.model.hold("auto", batch_tokens=64, tokens=TOKENS.size, free=free)
            assert held == Residency(prefetch=layers == 2)
            rows = engine.sweep(TOKENS, range(6), (4,), (), lambda _: None)
        peaks[layers] = torch.cuda.max_memory_allocated() - before
        found[layers] = rows.tensors["boundary 4"].cpu()
    assert torch.equal(found[1], found[2])
    assert 2 * layer < peaks[2] < 2.5 * layer
    assert layer < peaks[1] < 1.5 * layer
