"""Mixture layers whose routed experts are read in parts, against the same layers as a whole."""

import weakref

import numpy as np
import pytest
import torch
import transformers
from block_scaled import save_in_fp8
from disk_steps import Killed
from families import _GQA, _HEAD, CUTS, NUM_LAYERS, VOCAB, random_operators, save_checkpoint
from recording import Recorder, saved_at_once
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.checkpoint.weight_reader import WeightReader
from ghost_dist.engines import offloaded
from ghost_dist.engines.expert_parts import Inputs, SplitLayer, routed_experts
from ghost_dist.engines.find_halves import with_halves
from ghost_dist.engines.memory import even_part
from ghost_dist.engines.offloaded import OffloadedModel
from ghost_dist.engines.offloaded_rows import OffloadedEngine, prove_offloaded
from ghost_dist.engines.resident import ResidentEngine, load_decoder
from ghost_dist.engines.sweep import AtEnd, sweep
from ghost_dist.errors import CheckpointError, ConfigError, UnsupportedArchitectureError
from ghost_dist.spans import parse_sublayers
from ghost_dist.statistics.stream_state import StreamState

CPU = torch.device("cpu")
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]
WINDOWS, LENGTH = 5, 20
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (WINDOWS, LENGTH), dtype=np.int32)


def in_parts(source, architecture, experts, dtype=torch.float32, num_layers=NUM_LAYERS):
    prove_offloaded(source.path, CPU)
    engine = OffloadedEngine(
        OffloadedModel(source, architecture, num_layers=num_layers, dtype=dtype, device=CPU), 2
    )
    engine.model.hold(experts, batch_tokens=2 * LENGTH, tokens=TOKENS.size)
    return engine


def recorded(engine, architecture):
    mlp = tuple(sorted(architecture.down_projections))[:2]
    recorder = Recorder(tuple(range(NUM_LAYERS + 1)), mlp)
    engine.run(TOKENS, range(WINDOWS), recorder, lambda _: None)
    return recorder


def resident(source, architecture, dtype=torch.float32):
    decoder = load_decoder(
        source.path, architecture, num_layers=NUM_LAYERS, dtype=dtype, device=CPU
    )
    return ResidentEngine(decoder, 2)


def assert_same(got, expected):
    assert got.streams.keys() == expected.streams.keys()
    assert got.mlp.keys() == expected.mlp.keys()
    for key, stream in expected.streams.items():
        assert torch.equal(got.streams[key], stream), key
    for key, parts in expected.mlp.items():
        assert all(map(torch.equal, got.mlp[key], parts)), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 3, 4])
@pytest.mark.parametrize("family", MIXTURES)
def test_streams_and_mlp_rows_are_bitwise_those_of_whole_layers(checkpoint, family, at_once, dtype):
    """In bfloat16 the router's weights are float32 in some families, and bfloat16 in others."""
    source, architecture = checkpoint(family)
    engine = in_parts(source, architecture, at_once, dtype)
    assert bool(engine.model._split) == (at_once < 4)
    expected = recorded(resident(source, architecture, dtype), architecture)
    assert_same(recorded(engine, architecture), expected)


@pytest.fixture(scope="module")
def seven_experts(tmp_path_factory):
    """Three of seven experts for a token: sums of three depend on their order."""
    config = transformers.Qwen3MoeConfig(
        **{**_GQA, **_HEAD, "num_hidden_layers": NUM_LAYERS},
        num_experts=7,
        num_experts_per_tok=3,
        moe_intermediate_size=48,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.08 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("seven")
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    source = open_checkpoint(folder)
    return source, inspect_architecture(source)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_made_as_each_implementation_makes_them(
    seven_experts, monkeypatch, implementation, dtype
):
    monkeypatch.setattr(
        PreTrainedModel, "get_correct_experts_implementation", lambda *_: implementation
    )
    source, architecture = seven_experts
    expected = recorded(resident(source, architecture, dtype), architecture)
    for at_once in (1, 2, 5):
        engine = in_parts(source, architecture, at_once, dtype)
        assert engine.model.model.config._experts_implementation == implementation
        got = recorded(engine, architecture)
        if implementation != "batched_mm":
            assert_same(got, expected)
            continue
        # Its matrix products depend in the last bits on how many pairs there are.
        for key, stream in expected.streams.items():
            bound = 8 * NUM_LAYERS * torch.finfo(dtype).eps * float(stream.abs().max())
            torch.testing.assert_close(got.streams[key], stream, rtol=0, atol=bound)


@pytest.mark.parametrize("family", MIXTURES)
def test_every_tensor_is_read_once_and_few_experts_are_at_hand(checkpoint, family, monkeypatch):
    source, architecture = checkpoint(family)
    at_hand, install = [], OffloadedModel._install

    def watched(self, targets, tensors):
        install(self, targets, tensors)
        held = sum(p.nbytes for p in self.layers.parameters() if p.device.type != "meta")
        at_hand.append(held)

    def held_when_answering(self, *arguments):
        parameters = self._experts.parameters(recurse=False)
        assert all(parameter.device.type == "meta" for parameter in parameters)
        return answer(self, *arguments)

    answer = SplitLayer._answer
    monkeypatch.setattr(SplitLayer, "_answer", held_when_answering)
    monkeypatch.setattr(OffloadedModel, "_install", watched)
    found = {}
    for at_once in (1, 4):
        at_hand.clear()
        engine = in_parts(source, architecture, at_once, num_layers=3)
        engine.run(TOKENS, range(WINDOWS), Recorder((1, 3)), lambda _: None)
        needed = sum(
            tensor.nbytes
            for name, tensor in source.tensors.items()
            if any(f"layers.{layer}." in name for layer in range(3)) or "embed_tokens" in name
        )
        assert engine.model.bytes_read == needed
        assert not any(p.device.type != "meta" for p in engine.model.layers.parameters())
        found[at_once] = max(at_hand)
    layers, buffers = engine.model.sizes.layers, 16  # of a router, in float32
    whole = max(layer.loaded_bytes for layer in layers)
    in_parts_of_one = max(layer.rest_bytes + layer.expert_bytes for layer in layers)
    assert whole - buffers <= found[4] <= whole
    assert in_parts_of_one - buffers <= found[1] <= in_parts_of_one
    assert found[1] < next(layer.loaded_bytes for layer in layers if layer.experts)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("cut", ["middle", "two"])
def test_variants_are_bitwise_those_of_whole_layers(checkpoint, family, cut):
    source, architecture = checkpoint(family)
    architecture = with_halves(source, architecture)
    spans = CUTS[cut]
    halves = parse_sublayers("mlp:0,attention:5")
    variants = [
        *(Variant(), Variant(sublayers=halves), Variant(spans)),
        Variant(spans, random_operators(spans), sublayers=halves),
    ]
    found = {}
    prove_offloaded(source.path, CPU)
    for at_once in ("auto", 3):
        logits = found.setdefault(at_once, [])
        with OffloadedModel(
            source, architecture, num_layers=NUM_LAYERS, dtype=torch.float32, device=CPU
        ) as model:
            model.hold(at_once, batch_tokens=2 * LENGTH, tokens=4 * TOKENS.size)
            assert bool(model._split) == (at_once == 3)

            def keep(_, streams, model=model, logits=logits):
                logits += [model.logits(stream.flatten(0, 1)) for stream in streams]

            sweep(model, variants, TOKENS, [AtEnd(keep)], batch=2)
            # Without attention the experts are asked for something else, so they are read again.
            layer = model.sizes.layers[5]
            again = layer.loaded_bytes - layer.rest_bytes if at_once == 3 else 0
            assert model.bytes_read == source.nbytes + again
    assert len(found[3]) == 12
    assert all(map(torch.equal, found[3], found["auto"]))


def test_block_scaled_fp8_in_parts_is_its_bfloat16_twin_in_parts(tmp_path):
    source = save_checkpoint("deepseek_v3", tmp_path / "source", torch.bfloat16)
    save_in_fp8(source, tmp_path / "stored", tmp_path / "twin", (40, 28))
    found = []
    for name in ("stored", "twin"):
        opened = open_checkpoint(tmp_path / name)
        architecture = inspect_architecture(opened)
        engine = in_parts(opened, architecture, 3)
        found.append(recorded(engine, architecture))
        needed = sum(opened.stored_bytes(n) for n in opened.tensors if "lm_head" not in n)
        assert engine.model.bytes_read == needed - opened.stored_bytes("model.norm.weight")
    assert_same(*found)


def test_a_sweep_killed_between_two_parts_repeats_that_layer(checkpoint, tmp_path, monkeypatch):
    source, architecture = checkpoint("mixtral")

    def sweep(state, die_in=None):
        engine = in_parts(source, architecture, 3)
        with engine.model:
            parts, run_part = [], SplitLayer._run_part

            def watched(self, part, batch):
                parts.append(part)
                if die_in is not None and part.start and len(parts) > die_in:
                    raise Killed
                run_part(self, part, batch)

            with monkeypatch.context() as patch:
                patch.setattr(SplitLayer, "_run_part", watched)
                windows = range(WINDOWS) if state is None else state.windows
                rows = engine.sweep(
                    TOKENS, windows, (2, 5), (), lambda _: saved_at_once(state), state
                )
        return rows, engine.model.bytes_read

    expected, all_bytes = sweep(None)
    state = StreamState(tmp_path / "state", "same", range(WINDOWS))
    with pytest.raises(Killed):
        sweep(state, die_in=2 * 6 + 1)  # two parts of three batches in each of two layers
    state.close()
    state = StreamState(tmp_path / "state", "same", range(WINDOWS))
    assert state.load().boundary == 2
    rows, nbytes = sweep(state)
    done = sum(
        t.nbytes for n, t in source.tensors.items() if ".layers.0." in n or ".layers.1." in n
    )
    assert all_bytes - nbytes == done
    for name, tensor in expected.tensors.items():
        assert torch.equal(rows.tensors[name], tensor), name


def test_nan_in_an_expert_is_named(tmp_path):
    source = open_checkpoint(save_checkpoint("mixtral", tmp_path / "model"))
    name = next(n for n in source.tensors if "layers.3." in n and "experts.2.w3" in n)
    path = source.path / source.tensors[name].file
    tensors = load_file(path)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    source = open_checkpoint(source.path)
    engine = in_parts(source, inspect_architecture(source), 1)
    with pytest.raises(CheckpointError, match=r"layers.3.mlp.experts.gate_up_proj holds NaN"):
        engine.run(TOKENS, [0], Recorder((5,)), lambda _: None)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_small_model_is_run_in_parts_too(checkpoint, family, monkeypatch):
    source, _ = checkpoint(family)
    prove_offloaded.cache_clear()
    # Experts of the small model are 16 wide, and a scalar sigmoid differs from a vectorised one.
    assert prove_offloaded(source.path, CPU, 3) < 1e-6
    monkeypatch.setattr(SplitLayer, "_answer", lambda self, *_: self._batches.popleft().hidden_NC)
    prove_offloaded.cache_clear()
    assert prove_offloaded(source.path, CPU) == 0.0
    with pytest.raises(UnsupportedArchitectureError, match="its experts in parts: a small random"):
        prove_offloaded(source.path, CPU, 3)


@pytest.fixture
def free(monkeypatch):
    def have(nbytes):
        monkeypatch.setattr(offloaded, "free_bytes", lambda _: nbytes)

    return have


def test_as_many_experts_as_fit(checkpoint, free):
    source, architecture = checkpoint("mixtral")
    engine = in_parts(source, architecture, 4)
    model = engine.model
    layer = model.sizes.largest_layer_bytes
    expert = 3 * 64 * 96 * 4
    rest = layer - 4 * expert
    beside = max(rest, model.sizes.head_bytes)
    batch = 2 * 40 * 3 * (2 * 2 * 96) * 4  # twice 40 tokens, each in two experts; more than pairs
    streams = TOKENS.size * 64 * 4

    def held(nbytes, experts="auto"):
        free(int(nbytes / 0.85) + 4)
        return model.hold(experts, batch_tokens=40, tokens=TOKENS.size, head=False).experts

    assert held(3 * layer + batch + 2 * streams) is None
    needed = batch + 2 * rest + 5 * streams  # two kept, one asked, two answered
    least = batch + 3 * layer + 2 * streams
    assert needed + 4 * expert < least - 1000
    assert held(least - 1000) == 2  # a layer that does not fit is in two parts at least
    assert held(needed + 4 * expert) == 2
    assert held(needed + 4 * expert - 1000) == 1
    assert held(needed + 2 * expert) == 1
    assert model.bytes_at_once() == rest + beside + 2 * expert
    with pytest.raises(ConfigError, match=r"do not fit cpu: one routed expert at a time"):
        held(needed + 2 * expert - 1000)
    assert held(1 << 40) is None
    assert model.bytes_at_once() == 3 * layer
    assert held(1 << 40, 3) == 3
    assert held(1000, 4) is None  # as the user says


def test_parts_are_few_and_alike():
    assert [even_part(8, n) for n in (1, 2, 3, 4, 5, 7, 8, 100)] == [1, 2, 3, 4, 4, 4, 4, 4]
    assert even_part(7, 3) == 3
    assert even_part(384, 100) == 96


def test_compiled_layers_are_whole(checkpoint):
    source, architecture = checkpoint("mixtral")
    engine = OffloadedEngine(
        OffloadedModel(
            source, architecture, num_layers=2, dtype=torch.float32, device=CPU, compiled=True
        ),
        2,
    )
    with pytest.raises(ConfigError, match="compile=true compiles whole layers"):
        engine.model.hold(1, batch_tokens=1, tokens=1)


def jetmoe(folder):
    """Its layers have four modules of experts each: two in attention, two in the MLP."""
    config = transformers.JetMoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=4,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    transformers.JetMoeForCausalLM(config).save_pretrained(folder)
    return open_checkpoint(folder)


def test_a_family_that_cannot_be_split_is_named_only_where_it_would_have_to_be(tmp_path, free):
    source = jetmoe(tmp_path / "model")
    architecture = inspect_architecture(source)
    engine = in_parts(source, architecture, "auto", num_layers=2)
    assert not engine.model._split
    for experts in (1, 3):
        with pytest.raises(UnsupportedArchitectureError, match=r"Family jetmoe: .*4 modules of ex"):
            in_parts(source, architecture, experts, num_layers=2)
    free(1000)
    with pytest.raises(UnsupportedArchitectureError, match="cannot be run in parts"):
        in_parts(source, architecture, "auto", num_layers=2)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_are_called_otherwise_are_an_error(checkpoint, family, monkeypatch):
    source, architecture = checkpoint(family)
    engine = in_parts(source, architecture, 2)
    module = next(
        engine.model.layers[layer].get_submodule(found.path)
        for layer, found in engine.model._experts.items()
    )
    block = type(engine.model.layers[-1].mlp)
    whole = block.forward

    def twice(self, hidden_states):
        whole(self, hidden_states + 0)
        return whole(self, hidden_states)

    monkeypatch.setattr(block, "forward", twice)
    with pytest.raises(UnsupportedArchitectureError, match="more than once for a batch"):
        recorded(engine, architecture)
    monkeypatch.setattr(block, "forward", lambda self, x: (x, x) if family == "gpt_oss" else x)
    with pytest.raises(UnsupportedArchitectureError, match="a layer did not call them"):
        recorded(engine, architecture)
    assert routed_experts(module).path == ""


def test_inputs_come_as_often_as_they_are_asked_for():
    streams = torch.arange(30.0).view(5, 2, 3)
    inputs = Inputs([streams, streams + 1], 2, CPU)
    assert inputs.num_tokens == 20
    for _ in range(2):
        batches = list(inputs)
        assert [len(batch) for batch in batches] == [2, 2, 1, 2, 2, 1]
        assert torch.equal(torch.cat(batches), torch.cat([streams, streams + 1]))


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_was_read_is_given_up_before_the_next_part_is_read(checkpoint, monkeypatch, at_once):
    """Of one part what was read and what it was stacked into, or of two: no more at any time."""
    source, architecture = checkpoint("mixtral")
    engine = in_parts(source, architecture, at_once, num_layers=2)
    read, start = [], WeightReader.start

    def watched(self, names, rows=None):
        alive = [reference for reference in read if reference() is not None]
        reading = start(self, names, rows)
        if any("experts" in name for name in names):
            assert not alive, "an earlier part is still there"
            read.extend(weakref.ref(tensor) for tensor in reading._tensors.values())
        return reading

    monkeypatch.setattr(WeightReader, "start", watched)
    engine.run(TOKENS, range(WINDOWS), Recorder((2,)), lambda _: None)
    assert len(read) == 2 * 4 * 3
