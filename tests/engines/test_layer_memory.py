"""What of the layers is on the device at once: the choice, and that it is kept."""

import dataclasses

import pytest
import torch

from ghost_dist.engines import offloaded
from ghost_dist.engines.memory import LayerBytes, Residency, choose_residency
from ghost_dist.engines.model_sizes import model_sizes
from ghost_dist.engines.offloaded import OffloadedModel
from ghost_dist.engines.offloaded_rows import OffloadedEngine, prove_offloaded
from ghost_dist.errors import ConfigError

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 67, dtype=torch.int32).reshape(4, 16).numpy()
DENSE = LayerBytes(layer=100, embeddings=90, head=0, batch=0)
MIXTURE = LayerBytes(
    layer=100, embeddings=30, head=0, batch=0, rest=20, beside=20, expert=10, count=8
)


@pytest.mark.parametrize(
    ("layers", "free", "held"),
    [
        (DENSE, 200, Residency()),
        (DENSE, 199, Residency(prefetch=False)),
        (DENSE, 100, Residency(prefetch=False)),
        (DENSE, 99, None),
        (MIXTURE, 300, Residency()),
        (MIXTURE, 299, Residency(4)),  # two parts, though all would fit one
        (MIXTURE, 119, Residency(3)),
        (MIXTURE, 60, Residency(1)),
        (MIXTURE, 59, None),
        (dataclasses.replace(MIXTURE, count=0), 199, Residency(prefetch=False)),
        (dataclasses.replace(MIXTURE, head=90), 130, Residency(1)),  # read beside the last layer
        (dataclasses.replace(MIXTURE, pairs=50), 110, Residency(1)),
    ],
)
def test_the_first_that_fits(layers, free, held):
    assert choose_residency(lambda held: layers.at_once(held) <= free, layers.count) == held
    assert held is None or layers.at_once(held) <= free


def test_whole_layers_one_at_a_time_where_parts_do_not_fit():
    """What experts are asked and answer can take more than a layer."""
    found = choose_residency(lambda held: held == Residency(prefetch=False), 8)
    assert found == Residency(prefetch=False)


def test_a_number_is_taken_as_it_is():
    for fits, held in ((False, Residency(prefetch=False)), (True, Residency())):
        assert choose_residency(lambda _, fits=fits: fits, 8, 3) == Residency(3)
        assert choose_residency(lambda _, fits=fits: fits, 8, 8) == held
        assert choose_residency(lambda _, fits=fits: fits, 0, 1) == held


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "qwen3_moe"])
def test_plan_and_engine_count_the_same(checkpoint, family, dtype, head):
    source, architecture = checkpoint(family)
    planned = model_sizes(source, architecture, dtype).layer_bytes(32, head=head)
    with OffloadedModel(
        source, architecture, num_layers=architecture.num_layers, dtype=dtype, device=CPU
    ) as model:
        assert model.sizes.layer_bytes(32, head=head) == planned


@pytest.fixture
def watched(monkeypatch):
    """Groups whose weights are there or being read, at every start of a reading."""
    counts, model = [], {}
    start, release = OffloadedModel._start, OffloadedModel._release

    def starting(self, group):
        there = model.setdefault(id(self), set())
        there.add(group)
        counts.append(len(there))
        return start(self, group)

    def releasing(self, group):
        model[id(self)].discard(group)
        return release(self, group)

    monkeypatch.setattr(OffloadedModel, "_start", starting)
    monkeypatch.setattr(OffloadedModel, "_release", releasing)
    return counts


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_layers_read_one_at_a_time_give_the_same_bits(checkpoint, family, watched, monkeypatch):
    source, architecture = checkpoint(family)
    prove_offloaded(source.path, CPU)
    found = {}
    for prefetch in (True, False):
        watched.clear()
        engine = OffloadedEngine(
            OffloadedModel(source, architecture, num_layers=5, dtype=torch.float32, device=CPU), 2
        )
        model = engine.model
        sizes = model.sizes.layer_bytes(32, head=True)
        waiting = 2 * TOKENS.size * model.hidden_size * 4
        needed = sizes.at_once(Residency()) if prefetch else sizes.at_once(Residency()) - 1000
        free = int((needed + waiting) / 0.85) + 4
        monkeypatch.setattr(offloaded, "free_bytes", lambda _, free=free: free)
        # All experts at a time, so that mixtures are whole too.
        held = model.hold(99, batch_tokens=32, tokens=TOKENS.size)
        assert held == Residency(prefetch=prefetch)
        rows = engine.sweep(TOKENS, range(4), (2, 5), (), lambda _: None)
        found[prefetch] = [rows.tensors[f"boundary {b}"].clone() for b in (2, 5)]
        assert max(watched) == (2 if prefetch else 1)
        assert len(watched) == 6  # embeddings and five layers, each once
        engine.model.close()
    assert all(map(torch.equal, found[True], found[False]))


def test_a_dense_layer_that_does_not_fit_is_refused_before_it_is_read(checkpoint, monkeypatch):
    source, architecture = checkpoint("llama")
    monkeypatch.setattr(offloaded, "free_bytes", lambda _: 1000)
    engine = OffloadedEngine(
        OffloadedModel(source, architecture, num_layers=2, dtype=torch.float32, device=CPU), 2
    )
    with pytest.raises(ConfigError, match="The layers do not fit cpu: one whole layer at a time"):
        engine.model.hold("auto", batch_tokens=32, tokens=TOKENS.size)
    assert engine.model.bytes_read == 0


def test_a_tied_head_counts_as_the_embeddings(checkpoint):
    source, architecture = checkpoint("gpt2")
    with OffloadedModel(
        source, architecture, num_layers=2, dtype=torch.float32, device=CPU
    ) as model:
        assert model._tied
        held = model.sizes.layer_bytes(0, head=True).weights(Residency())
        assert held >= model.sizes.largest_layer_bytes + model.sizes.below_bytes
