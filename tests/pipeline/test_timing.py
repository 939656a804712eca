"""Seconds of the forward and of the sums, apart."""

import time
from types import SimpleNamespace

import pytest
import torch
from families import save_checkpoint

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.devices import watched_idle
from ghost_dist.engines.resident import ResidentEngine, load_decoder
from ghost_dist.pipeline.collectors import Stopwatch, sums_of_range

CPU = torch.device("cpu")


class Slow:
    """A collector that takes its time."""

    boundaries, mlp_layers = (1, 3), (0,)

    def __init__(self):
        self.seen = []

    def __call__(self, boundary, window, stream_TC):
        self.seen.append((boundary, window))
        time.sleep(0.02)

    def take_mlp(self, layer, window, input_TF, product_TC):
        self.seen.append((layer, window))
        time.sleep(0.02)

    def result(self):
        time.sleep(0.1)
        return {"seen": len(self.seen)}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    source = open_checkpoint(save_checkpoint("llama", tmp_path_factory.mktemp("llama") / "model"))
    architecture = inspect_architecture(source)
    decoder = load_decoder(source.path, architecture, num_layers=3, dtype=torch.float32, device=CPU)
    return ResidentEngine(decoder, 2)


def test_sums_are_what_the_collector_takes_and_the_rest_is_the_forward(engine):
    tokens = torch.zeros(4, 16, dtype=torch.int32).numpy()
    slow_forward = []
    handle = engine.decoder.layers[0].register_forward_pre_hook(
        lambda *_: slow_forward.append(time.sleep(0.05))
    )
    began = time.perf_counter()
    slow = SimpleNamespace(collector=lambda *_: Slow())
    sums, times = sums_of_range(engine, tokens, (0, 1, 2, 3), slow, lambda _: None)
    whole = time.perf_counter() - began
    handle.remove()
    assert sums == {"seen": 12}  # two boundaries and an MLP, four windows
    assert len(slow_forward) == 2  # batches
    slept = 12 * 0.02 + 0.1
    assert slept <= times.sums_s
    assert times.forward_s >= 2 * 0.05
    assert times.forward_s + times.sums_s <= whole
    assert times.forward_s < whole - slept


def test_a_stopwatch_counts_its_laps_only():
    watch = Stopwatch(CPU)
    began = watch.now()
    for _ in range(2):
        with watch.lap():
            time.sleep(0.03)
        time.sleep(0.05)
    whole = watch.until_now(began)
    assert 0.06 <= watch.seconds() <= whole - 0.1


def test_idle_share_is_that_of_the_time_in_which_the_stream_was_done(monkeypatch):
    """A stand-in for a GPU's stream that works for the first of three parts of the time."""
    began = time.monotonic()
    stream = SimpleNamespace(query=lambda: time.monotonic() - began > 0.3)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: stream)
    with watched_idle(torch.device("cuda:0")) as idle:
        time.sleep(0.9 - (time.monotonic() - began))
        assert idle() == pytest.approx(2 / 3, abs=0.1)
    with watched_idle(CPU) as idle:
        assert idle() is None
