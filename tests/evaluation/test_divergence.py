"""Divergences from one model in memory against two models run side by side."""

import numpy as np
import pytest
import torch
from families import CUTS, HIDDEN, VOCAB, random_operators, random_repairs, random_tokens

from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.surgery import insert_operators, remove_layers
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines import sweep
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.engines.sweep import layers_run
from ghost_dist.evaluation import scores
from ghost_dist.evaluation.scores import window_scores
from ghost_dist.spans import Span

CPU = torch.device("cpu")
FAMILIES = ["llama", "gemma3", "opt", "gpt_neox", "mixtral"]
TOKENS = random_tokens(rows=5, length=12)
ROUNDING = 1e-4  # of a divergence; the largest difference that was seen is a tenth of it


def load(source):
    return load_causal_lm(source.path, dtype=torch.float32, device=CPU)


def logits(model):
    with torch.inference_mode():
        return torch.cat([model(row[None], use_cache=False).logits[0] for row in TOKENS]).double()


def candidates_of(spans, architecture):
    """The plain cut first; repairs of every form, of all spans and of the last one only."""
    joint = random_repairs("ghost-joint", spans, architecture)
    return [
        {},
        random_operators(spans),
        joint,
        random_repairs("stream+norm", spans, architecture),
        {spans[-1]: joint[spans[-1]]},
    ]


def by_hand(source, architecture, spans, candidate, dense):
    """KL of the logits of a second copy of the model that was really cut."""
    model = load(source)
    remove_layers(model, architecture, spans)
    insert_operators(model, architecture, Variant(spans, candidate))
    expected, got = torch.log_softmax(dense, -1), torch.log_softmax(logits(model), -1)
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def measure(model, architecture, spans, candidates, batch, **arguments):
    tokens = TOKENS.numpy().astype(np.int32)
    variants = [Variant(), *(Variant(spans, candidate) for candidate in candidates)]
    layers = LayerwiseModel(model, architecture)
    _, *found = window_scores(layers, variants, tokens, batch=batch, **arguments)
    return [one.kl.mean() for one in found]


@pytest.mark.parametrize("cut", ["two", "first", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_against_a_second_model_that_is_cut(checkpoint, monkeypatch, family, cut):
    """All candidates at once, in every batch size, are what two models side by side give."""
    monkeypatch.setitem(sweep._ENOUGH_TOKENS, "cpu", 1 << 20)
    source, architecture = checkpoint(family)
    spans, model = CUTS[cut], load(source)
    candidates, before = candidates_of(spans, architecture), logits(model)
    expected = [by_hand(source, architecture, spans, c, before) for c in candidates]
    assert min(expected) > 1e-3
    assert len({round(value, 3) for value in expected}) >= 3, "they could be mixed up unseen"
    for batch in (1, 2, 3, 2 * len(TOKENS)):  # in the last one two candidates go side by side
        done = []
        got = measure(model, architecture, spans, candidates, batch, advance=done.append)
        assert got == pytest.approx(expected, rel=ROUNDING)
        assert sum(done) == TOKENS.numel()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("batch", [2, 2 * len(TOKENS)])
def test_candidates_do_not_disturb_each_other(checkpoint, monkeypatch, batch):
    """A candidate that changes an early layer moves where all others enter, and nothing else."""
    monkeypatch.setitem(sweep._ENOUGH_TOKENS, "cpu", 1 << 20)
    source, architecture = checkpoint("llama")
    spans, model = CUTS["two"], load(source)
    rows = set()
    for layer in model.model.layers[spans[-1].stop :]:
        layer.register_forward_hook(lambda _m, args, _o: rows.add(len(args[0])))
    candidates = candidates_of(spans, architecture)
    together = measure(model, architecture, spans, candidates, batch)
    assert max(rows) == batch
    alone = [measure(model, architecture, spans, [c], batch)[0] for c in candidates]
    assert together == pytest.approx(alone, rel=1e-6)
    backwards = measure(model, architecture, spans, candidates[::-1], batch)
    assert backwards[::-1] == pytest.approx(together, rel=1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_variants_that_are_equal_up_to_a_layer_run_it_once(checkpoint, monkeypatch, whole):
    """Removals that grow layer by layer, with the operators that they have in common."""
    source, architecture = checkpoint("llama")
    first, last = Span(1, 2), Span(4, 5)
    operators = random_operators((first, last))
    early = {first: operators[first]}
    variants = [Variant(), Variant((first,), early), Variant((first, last), operators)]
    variants += [Variant((first, last), early), Variant((first, last), operators)]
    layers, ran = LayerwiseModel(load(source), architecture), []
    monkeypatch.setattr(layers, "whole", whole)
    tokens, batch = TOKENS.numpy().astype(np.int32), len(TOKENS)
    alone = [window_scores(layers, [Variant(), one], tokens, batch=batch)[1].kl for one in variants]
    for layer, module in enumerate(layers.layers):
        module.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    found = window_scores(layers, variants, tokens, batch=batch)
    assert sorted(ran) == sorted(layers_run(variants, architecture.num_layers))
    assert ran.count(3) == 2
    assert ran.count(5) == 4
    np.testing.assert_array_equal([one.kl for one in found], alone)
    assert len({float(one.kl.mean()) for one in found}) == 4


def test_a_candidate_that_is_the_dense_model(checkpoint):
    """Layers that add nothing can be cut without a trace, and a down_proj replaced by itself."""
    source, architecture = checkpoint("llama")
    spans, model = (Span(2, 4),), load(source)
    for layer in model.model.layers[2:4]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    down_FC = model.model.layers[1].mlp.down_proj.weight.T.clone()
    same = {spans[0]: Repair(torch.eye(HIDDEN), down_FC=down_FC)}
    other = {spans[0]: Repair(torch.eye(HIDDEN), down_FC=1.1 * down_FC)}
    cut, got, changed = measure(model, architecture, spans, [{}, same, other], 2)
    assert abs(cut) < 1e-7
    assert abs(got) < 1e-7
    assert changed > 1e-4


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_small_pieces_of_logits(checkpoint, monkeypatch, family):
    """The logits of a batch may be taken a few tokens at a time."""
    source, architecture = checkpoint(family)
    spans, model = CUTS["middle"], load(source)
    candidates = [{}, random_operators(spans)]
    whole = measure(model, architecture, spans, candidates, 2)
    sizes, original = [], LayerwiseModel.logits

    def counted(self, stream_NC):
        sizes.append(len(stream_NC))
        return original(self, stream_NC)

    monkeypatch.setattr(LayerwiseModel, "logits", counted)
    monkeypatch.setattr(scores, "_LOGITS_AT_ONCE", 5 * VOCAB + 1)  # does not divide a window
    got = measure(model, architecture, spans, candidates, 2)
    assert got == pytest.approx(whole, rel=1e-5)
    assert max(sizes) == 5
    assert sum(sizes) == 3 * TOKENS.numel()


def test_pieces_on_a_cpu_fit_its_caches():
    def rows(vocab_size, device):
        pieces = list(scores.logit_pieces(4096, vocab_size, torch.device(device)))
        assert [pieces[0].start, pieces[-1].stop] == [0, 4096]
        return pieces[0].stop

    assert [rows(size, "cpu") for size in (256, 3072, 49152, 262144)] == [4096, 682, 128, 128]
    assert [rows(size, "cuda") for size in (256, 3072, 49152, 262144)] == [4096, 4096, 682, 128]


def test_overflow_is_told_apart_from_a_number(checkpoint):
    """A candidate that overflows must not look like a good one, nor spoil the others."""
    source, architecture = checkpoint("llama")
    spans, model = CUTS["middle"], load(source)
    wild = {spans[0]: Repair(torch.full((HIDDEN, HIDDEN), float("inf")))}
    cut, got = measure(model, architecture, spans, [{}, wild], 2)
    assert np.isfinite(cut)
    assert not np.isfinite(got)
