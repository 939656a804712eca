"""What of the layers is on the device at once: the choice, and that it is kept."""

import dataclasses

import pytest
import torch

from ghost_dist.engines import streamed_model
from ghost_dist.engines.layer_fit import Held, LayerBytes, Room, fit_layers
from ghost_dist.engines.streamed_model import StreamedModel
from ghost_dist.engines.streaming import StreamingEngine, prove_streamed
from ghost_dist.errors import ConfigError, UnsupportedArchitectureError

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 67, dtype=torch.int32).reshape(4, 16).numpy()
DENSE = LayerBytes(with_next=200, alone=100)
MIXTURE = LayerBytes(
    with_next=300, alone=200, rest=20, beside=20, expert=10, count=8, family="some"
)
UNSPLIT = dataclasses.replace(MIXTURE, problem="its experts are a list")


def room(whole, parts=None):
    return Room(whole, whole if parts is None else parts, 7, 9, 32, "some device")


@pytest.mark.parametrize(
    ("layers", "free", "held"),
    [
        (DENSE, 200, Held()),
        (DENSE, 199, Held(reads_ahead=False)),
        (DENSE, 100, Held(reads_ahead=False)),
        (MIXTURE, 300, Held()),
        (MIXTURE, 299, Held(4)),  # two parts, though all would fit one
        (MIXTURE, 119, Held(3)),
        (MIXTURE, 60, Held(1)),
        (UNSPLIT, 299, Held(reads_ahead=False)),
        (UNSPLIT, 200, Held(reads_ahead=False)),
    ],
)
def test_the_first_that_fits(layers, free, held):
    found = fit_layers(layers, room(free), "auto")
    assert found == held
    assert layers.at_once(found) <= free


def test_whole_layers_one_at_a_time_where_parts_do_not_fit():
    """What experts are asked and answer can take more than a layer."""
    assert fit_layers(MIXTURE, room(200, 59), "auto") == Held(reads_ahead=False)
    assert fit_layers(MIXTURE, room(299), "auto", may_split=False) == Held(reads_ahead=False)


@pytest.mark.parametrize(
    ("layers", "left", "text"),
    [
        (DENSE, room(99), r"one whole layer at a time takes 0.00 GB, a batch of 32 tokens"),
        (MIXTURE, room(59), r"do not fit some device: one routed expert at a time"),
    ],
)
def test_what_does_not_fit_is_refused(layers, left, text):
    with pytest.raises(ConfigError, match=text):
        fit_layers(layers, left, "auto")


def test_numbers_of_the_message():
    layers = LayerBytes(with_next=9 * 10**9, alone=5 * 10**9)
    left = Room(3 * 10**9, 0, 10**9, 0, 4096, "cuda:0")
    with pytest.raises(ConfigError, match=r"takes 5\.00 GB, .* 4096 tokens 1\.00 GB, .* 4\.00 GB"):
        fit_layers(layers, left, "auto")


def test_experts_that_cannot_be_split():
    for experts, left in (("auto", room(199)), (3, room(1000))):
        with pytest.raises(UnsupportedArchitectureError, match="its experts are a list"):
            fit_layers(UNSPLIT, left, experts)


def test_a_number_is_taken_as_it_is():
    assert fit_layers(MIXTURE, room(0), 3) == Held(3)
    assert fit_layers(MIXTURE, room(0), 8) == Held(reads_ahead=False)
    assert fit_layers(MIXTURE, room(300), 8) == Held()
    assert fit_layers(DENSE, room(0), 1) == Held(reads_ahead=False)


@pytest.fixture
def watched(monkeypatch):
    """Groups whose weights are there or being read, at every start of a reading."""
    counts, model = [], {}
    start, release = StreamedModel._start, StreamedModel._release

    def starting(self, group):
        there = model.setdefault(id(self), set())
        there.add(group)
        counts.append(len(there))
        return start(self, group)

    def releasing(self, group):
        model[id(self)].discard(group)
        return release(self, group)

    monkeypatch.setattr(StreamedModel, "_start", starting)
    monkeypatch.setattr(StreamedModel, "_release", releasing)
    return counts


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_layers_read_one_at_a_time_give_the_same_bits(checkpoint, family, watched, monkeypatch):
    source, architecture = checkpoint(family)
    prove_streamed(source.path, CPU)
    found = {}
    for reads_ahead in (True, False):
        watched.clear()
        engine = StreamingEngine(
            source, architecture, num_layers=5, dtype=torch.float32, device=CPU, batch=2
        )
        model = engine.model
        sizes = model._layer_bytes()
        waiting = 2 * TOKENS.size * model.hidden_size * 4
        batch = 16 * 32 * model.hidden_size * 4
        weights = sizes.with_next if reads_ahead else sizes.with_next - 1000
        free = int((weights + waiting + batch) / 0.85) + 4
        monkeypatch.setattr(streamed_model, "free_bytes", lambda _, free=free: free)
        # All experts at a time, so that mixtures are whole too.
        held = model.hold(99, batch_tokens=32, tokens=TOKENS.size)
        assert held == Held(reads_ahead=reads_ahead)
        assert model.bytes_at_once() == (sizes.with_next if reads_ahead else sizes.alone)
        rows = engine.sweep(TOKENS, range(4), (2, 5), (), lambda _: None)
        found[reads_ahead] = [rows.tensors[f"boundary {b}"].clone() for b in (2, 5)]
        assert max(watched) == (2 if reads_ahead else 1)
        assert len(watched) == 6  # embeddings and five layers, each once
        engine.close()
    assert all(map(torch.equal, found[True], found[False]))


def test_a_dense_layer_that_does_not_fit_is_refused_before_it_is_read(checkpoint, monkeypatch):
    source, architecture = checkpoint("llama")
    monkeypatch.setattr(streamed_model, "free_bytes", lambda _: 1000)
    engine = StreamingEngine(
        source, architecture, num_layers=2, dtype=torch.float32, device=CPU, batch=2
    )
    with pytest.raises(ConfigError, match="The layers do not fit cpu: one whole layer at a time"):
        engine.model.hold("auto", batch_tokens=32, tokens=TOKENS.size)
    assert engine.model.bytes_read == 0


def test_a_tied_head_counts_as_the_embeddings(checkpoint):
    source, architecture = checkpoint("gpt2")
    with StreamedModel(
        source, architecture, num_layers=2, dtype=torch.float32, device=CPU
    ) as model:
        assert model._tied
        embeddings = model._loaded_bytes("embeddings")
        layer = model._loaded_bytes(1)
        assert model._layer_bytes().with_next >= layer + embeddings
