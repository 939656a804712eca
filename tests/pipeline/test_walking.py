"""A walk against hooks on the whole causal LM, window by window."""

import numpy as np
import pytest
import torch
from families import CUTS, HIDDEN, oracle, random_repairs, random_tokens

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.pipeline.walking import Refit, Walk
from ghost_dist.spans import Span

CPU = torch.device("cpu")
TOKENS = random_tokens(rows=5, length=12)
FOLDS = [0, 1, 2, 0, 1]


def walked(model, architecture, spans, operators, tokens=TOKENS, folds=FOLDS, **arguments):
    """A walk that was run, and how many layers it said it passed."""
    passed = []
    layers = LayerwiseModel(model, architecture)
    walk = Walk(
        layers=layers,
        tokens=tokens.numpy().astype(np.int32),
        batch=2,
        spans=spans,
        operators=dict(operators),
        fold_of_window=folds,
        **arguments,
    )
    walk.take(walk.steps, passed.append)
    return walk, sum(passed)


@torch.inference_mode()
def streams(model, architecture, boundary, tokens=TOKENS):
    """What enters a layer (or the final norm) of the causal LM as it is now, (windows, T, C)."""
    layers, seen = model.get_submodule(architecture.layers), []
    last = boundary == len(layers)
    module = model.get_submodule(architecture.final_norm) if last else layers[boundary]

    def keep(_, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for row in tokens:
            model(row[None], use_cache=False)
    finally:
        handle.remove()
    return torch.cat(seen)


@torch.inference_mode()
def through_down(model, architecture, layer, tokens=TOKENS):
    """Input H of a down_proj and H @ down of the causal LM as it is now."""
    path = architecture.down_projections[layer]
    module = model.get_submodule(architecture.layers)[layer].get_submodule(path)
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        for row in tokens:
            model(row[None], use_cache=False)
    finally:
        handle.remove()
    h_BTF = torch.stack([h.reshape(tokens.shape[1], -1) for h in seen])
    return h_BTF, h_BTF @ module.weight.T


def weights_of(model):
    return {name: (id(p), p.clone()) for name, p in model.named_parameters()}


def assert_untouched(model, before):
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity, name
        assert torch.equal(after[name], value), name


def assert_close(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("cut", ["two", "first", "second", "last"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "gemma3", "mixtral"])
def test_streams_of_both_models(loaded, family, cut):
    """What a walk carries is what the whole models compute, new down_projs included."""
    model, architecture = loaded(family)
    spans = CUTS[cut]
    operators = random_repairs("ghost-joint", spans, architecture)
    before = weights_of(model)
    dense = streams(model, architecture, spans[-1].stop)
    walk, passed = walked(model, architecture, spans, operators)
    assert_untouched(model, before)
    assert torch.equal(streams(model, architecture, spans[-1].stop), dense)
    with oracle(model, architecture.layers, spans, operators):
        recovered = streams(model, architecture, spans[-1].stop)
    assert [len(batch) for batch in walk._dense] == [2, 2, 1]
    assert_close(torch.cat(walk._dense), dense)
    assert_close(torch.cat(walk._recovered), recovered)
    assert passed == 1 + spans[-1].stop, "the embeddings too"
    assert (recovered - dense).norm() > 0.1 * dense.norm()


def regressors_by_hand(kind, x_TC, h_TF, product_TC, eps):
    if kind == "joint":
        return torch.cat((x_TC - product_TC, h_TF), 1)
    if kind == "stream+norm":
        return torch.cat((x_TC, x_TC / (x_TC.square().mean(1, keepdim=True) + eps).sqrt()), 1)
    return x_TC


def assert_sums(folds, kind, x, h, product, y, eps):
    """Sums of each fold, in float64 from the windows that belong to it."""
    assert len(folds) == 3
    for fold, moments in enumerate(folds):
        windows = [window for window, of in enumerate(FOLDS) if of == fold]
        z, target = [], []
        for w in windows:
            z.append(regressors_by_hand(kind, *(part[w].double() for part in (x, h, product)), eps))
            target.append(y[w].double())
        z, target = torch.cat(z), torch.cat(target)
        assert moments.num_tokens == len(z) == 12 * len(windows)
        assert_close(moments.gram_ZZ, z.T @ z)
        assert_close(moments.cross_ZC, z.T @ target)
        assert_close(moments.sum_z_Z, z.sum(0), 1e-4)
        assert_close(moments.sum_y_C, target.sum(0), 1e-4)
        assert_close(moments.sumsq_y_C, target.square().sum(0))


class Noting:
    """A fit that gives a known repair and keeps the sums it was given."""

    def __init__(self, repair):
        self.repair, self.folds = repair, None

    def __call__(self, folds):
        self.folds = folds
        return self.repair, None


def a_repair(seed, inner=None):
    generator = torch.Generator().manual_seed(seed)
    weight_CC = torch.eye(HIDDEN) + torch.randn(HIDDEN, HIDDEN, generator=generator) / 8
    down_FC = None
    if inner is not None:
        down_FC = (torch.randn(inner, HIDDEN, generator=generator) / 12).double()
    return Repair(weight_CC.double(), down_FC=down_FC)


@pytest.mark.parametrize("kind", ["stream", "stream+norm", "joint"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_sums_of_a_refit(loaded, family, kind):
    """A later span is fitted on the recovered stream; the layer before it is the dense one."""
    model, architecture = loaded(family)
    spans = CUTS["two"]
    first, second = spans
    operators = random_repairs("ghost-joint", spans, architecture)
    noting = Noting(a_repair(1, inner=operators[second].down_FC.shape[0]))
    refits = {second: Refit(kind, noting)}
    before = weights_of(model)
    walk, _ = walked(model, architecture, spans, operators, refits=refits)
    assert_untouched(model, before)
    y = streams(model, architecture, second.stop)
    with oracle(model, architecture.layers, (first,), {first: operators[first]}):
        x = streams(model, architecture, second.start)
        h, product = through_down(model, architecture, second.start - 1)
    assert_sums(noting.folds, kind, x, h, product, y, architecture.norm_eps)
    # What follows is done with the new repair.
    assert walk.operators == {first: operators[first], second: noting.repair}
    assert walk.fits == {second: None}
    with oracle(model, architecture.layers, spans, walk.operators):
        assert_close(torch.cat(walk._recovered), streams(model, architecture, second.stop))


def test_a_refit_behind_a_span_at_the_first_layer(loaded):
    model, architecture = loaded("llama")
    spans = first, second = (Span(0, 2), Span(3, 6))
    operators = {first: a_repair(1), second: Repair()}
    noting = Noting(a_repair(2, inner=96))
    refits = {second: Refit("joint", noting)}
    walk, passed = walked(model, architecture, spans, operators, refits=refits)
    assert passed == 1 + 6 + 1, "the embeddings, and the layer before the refit again"
    y = streams(model, architecture, 6)
    with oracle(model, architecture.layers, (first,), {first: operators[first]}):
        x, parts = streams(model, architecture, 3), through_down(model, architecture, 2)
    assert_sums(noting.folds, "joint", x, *parts, y, architecture.norm_eps)
    with oracle(model, architecture.layers, spans, walk.operators):
        assert_close(torch.cat(walk._recovered), streams(model, architecture, 6))
