"""The resident engine against transformers' own hidden states, family by family."""

import contextlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from families import CUTS, FAMILIES, NUM_LAYERS, VOCAB, random_model, save_checkpoint
from recording import Recorder

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.layerwise import LayerwiseModel, adds_mlp_output
from ghost_dist.engines.resident import ResidentEngine, auto_batch, load_decoder
from ghost_dist.evaluation.scores import window_scores

CPU = torch.device("cpu")
WINDOWS, LENGTH = 5, 20
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (WINDOWS, LENGTH), dtype=np.int32)


def open_engine(folder, num_layers, batch):
    architecture = inspect_architecture(open_checkpoint(folder))
    decoder = load_decoder(
        folder, architecture, num_layers=num_layers, dtype=torch.float32, device=CPU
    )
    return ResidentEngine(decoder, batch), architecture


@torch.inference_mode()
def oracle(family, architecture):
    """Inputs of all layers and of the final norm, in the whole model with its head."""
    model = random_model(family)
    seen = {}
    modules = [*model.get_submodule(architecture.layers)]
    modules.append(model.get_submodule(architecture.final_norm))
    for boundary, module in enumerate(modules):

        def hook(_, args, kwargs, boundary=boundary):
            seen[boundary] = args[0] if args else kwargs["hidden_states"]

        module.register_forward_pre_hook(hook, with_kwargs=True)
    model(torch.from_numpy(TOKENS).long(), use_cache=False)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_boundaries_are_the_streams_of_the_whole_model(family, tmp_path):
    save_checkpoint(family, tmp_path)
    for num_layers, boundaries in ((NUM_LAYERS, (0, 1, 4, NUM_LAYERS)), (3, (2, 3))):
        engine, architecture = open_engine(tmp_path, num_layers, batch=2)
        recorder, done = Recorder(boundaries), []
        engine.run(TOKENS, [0, 1, 2, 3, 4], recorder, done.append)
        expected = oracle(family, architecture)
        for (boundary, window), stream_TC in recorder.streams.items():
            reference_TC = expected[boundary][window]
            scale = reference_TC.abs().max()
            # The whole model ran all windows at once: sums in another order, float32.
            assert (stream_TC - reference_TC).abs().max() < 2e-5 * scale, (boundary, window)
        assert len(recorder.streams) == len(boundaries) * WINDOWS
        assert sum(done) == TOKENS.size


def test_only_asked_windows_are_run_and_boundaries_ascend(tmp_path):
    save_checkpoint("llama", tmp_path)
    engine, _ = open_engine(tmp_path, 4, batch=3)
    recorder = Recorder((0, 2, 4))
    engine.run(TOKENS, [3, 1], recorder, lambda _: None)
    assert {window for _, window in recorder.order} == {1, 3}
    for window in (1, 3):
        assert [b for b, w in recorder.order if w == window] == [0, 2, 4]


def test_hooks_are_gone_after_an_error(tmp_path):
    save_checkpoint("llama", tmp_path)
    engine, _ = open_engine(tmp_path, 2, batch=1)

    class Failing(Recorder):
        def __call__(self, boundary, window, stream_TC):
            raise RuntimeError("the sink is full")

    with pytest.raises(RuntimeError, match="sink is full"):
        engine.run(TOKENS, [0], Failing((0, 1)), lambda _: None)
    recorder = Recorder((1,))
    engine.run(TOKENS, [0], recorder, lambda _: None)
    assert recorder.order == [(1, 0)]


def test_layers_above_the_last_boundary_are_not_loaded(tmp_path):
    save_checkpoint("llama", tmp_path)
    engine, _ = open_engine(tmp_path, 2, batch=1)
    names = [name for name, _ in engine.decoder.model.named_parameters()]
    assert any(".1." in name for name in names)
    assert not any(".2." in name or "head" in name for name in names)


def test_auto_batch_is_a_divisor_of_a_range_and_never_zero():
    assert auto_batch(CPU, 1 << 20, 8) == 1
    assert auto_batch(CPU, 512, 8) == 4
    assert auto_batch(CPU, 512, 6) == 3
    assert auto_batch(CPU, 512, 7) == 1
    assert auto_batch(CPU, 64, 4) == 4  # not 32, which all windows in order would give


ADDS = set(FAMILIES) - {
    *("gemma2", "gemma3", "olmo2"),  # the MLP's output is normed before it is added
    *("mixtral", "qwen3_moe", "gpt_oss"),  # experts only
    "gpt2",  # its projections are no nn.Linear
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_taken_apart_at_a_down_proj(tmp_path, family):
    """``x = A + H @ down + bias``: the sum of what is pushed is the next boundary."""
    engine, architecture = open_engine(save_checkpoint(family, tmp_path), 3, 2)
    layer = 0 if family == "deepseek_v3" else 1
    added = layer in architecture.down_projections and adds_mlp_output(engine.decoder, layer)
    assert added == (family in ADDS)
    if not added:
        return
    sink = Recorder((layer, layer + 1), (layer,))
    engine.run(TOKENS, range(WINDOWS), sink, lambda _: None)
    module = engine.decoder.down_projection(layer)
    assert module.in_features == architecture.inner_sizes[layer]
    silent = module.register_forward_hook(lambda _m, _a, output: output * 0)
    without = Recorder((layer + 1,))
    engine.run(TOKENS, range(WINDOWS), without, lambda _: None)
    silent.remove()
    for window in range(WINDOWS):
        h, product = sink.mlp[layer, window]
        torch.testing.assert_close(h @ module.weight.T, product, rtol=1e-4, atol=1e-4)
        a = sink.streams[layer + 1, window] - product
        expected = without.streams[layer + 1, window]
        if module.bias is not None:
            expected = expected + module.bias
        torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-4)


class Shelved(LayerwiseModel):
    """An engine added at run time: only the layer at hand has its numbers."""

    whole = False

    @contextlib.contextmanager
    def through(self, groups):
        shelf = {n: [p.clone() for p in layer.parameters()] for n, layer in enumerate(self.layers)}
        gone = {n: [torch.full_like(p, torch.nan) for p in kept] for n, kept in shelf.items()}

        def fill(layer, values):
            for parameter, value in zip(self.layers[layer].parameters(), values, strict=True):
                parameter.data = value

        def steps():
            for group in groups:
                if isinstance(group, int):
                    fill(group, shelf[group])
                yield group
                if isinstance(group, int):
                    fill(group, gone[group])

        with super().through(groups):
            for layer, values in gone.items():
                fill(layer, values)
            yield steps()
            for layer, values in shelf.items():
                fill(layer, values)


def test_an_engine_is_what_has_a_layer_at_hand_when_its_turn_comes(loaded):
    model, architecture = loaded("llama")
    variants = [Variant(), Variant(CUTS["two"])]
    expected, found = (
        window_scores(kind(model, architecture), variants, TOKENS, batch=2)
        for kind in (LayerwiseModel, Shelved)
    )
    for one, other in zip(expected, found, strict=True):
        assert (one.nats == other.nats).all()
        assert (one.kl == other.kl).all()
