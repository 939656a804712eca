"""The resident engine against transformers' own hidden states, family by family."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from families import FAMILIES, NUM_LAYERS, VOCAB, random_model, save_checkpoint

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.load import load_decoder
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.engines.resident import ResidentEngine, auto_batch

CPU = torch.device("cpu")
WINDOWS, LENGTH = 5, 20
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (WINDOWS, LENGTH), dtype=np.int32)


class Recorder:
    """Keeps what the engine pushes, and in which order."""

    def __init__(self, boundaries):
        self.boundaries = boundaries
        self.streams = {}
        self.order = []

    def __call__(self, boundary, window, stream_TC):
        assert (boundary, window) not in self.streams, "a window came twice"
        self.streams[boundary, window] = stream_TC.clone()
        self.order.append((boundary, window))


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
    names = [name for name, _ in engine._decoder._model.named_parameters()]
    assert any(".1." in name for name in names)
    assert not any(".2." in name or "head" in name for name in names)


def test_auto_batch_never_is_zero():
    assert auto_batch(CPU, 1 << 20) == 1
    assert auto_batch(CPU, 512) == 4
