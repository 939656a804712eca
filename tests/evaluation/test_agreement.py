"""Scores of three variants in one pass, against each model run alone by plain transformers."""

import copy

import numpy as np
import pytest
import torch

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.surgery import insert_operators, remove_layers
from ghost_dist.evaluation.agreement import score_variants
from ghost_dist.evaluation.perplexity import NonFiniteLossError
from ghost_dist.spans import Span

SPANS = [Span(1, 2), Span(3, 4)]


def make_windows(vocab_size, count=5, length=24):
    tokens = np.random.default_rng(0).integers(0, vocab_size, (count, length), dtype=np.int32)
    return TokenWindows(tokens, "random.txt")


def logits_of(model, windows):
    with torch.no_grad():
        ids = torch.from_numpy(windows.tokens.astype(np.int64))
        return model.eval()(ids).logits.double()


def make_variants(model, architecture):
    """Operators, a new down_proj, and the three models as they are exported."""
    torch.manual_seed(2)
    width = architecture.hidden_size
    operators = {
        span: Repair(weight_CC=torch.eye(width) + 0.1 * torch.randn(width, width)) for span in SPANS
    }
    layer = 4
    path = architecture.down_projections.get(layer)
    healed = {}
    if path is not None:
        module = model.get_submodule(architecture.layers)[layer].get_submodule(path)
        healed = {layer: 1.5 * module.weight.detach().T.clone()}
    cut, recovered = copy.deepcopy(model), copy.deepcopy(model)
    remove_layers(cut, architecture, SPANS)
    remove_layers(recovered, architecture, SPANS)
    insert_operators(recovered, architecture, SPANS, operators, healed)
    return operators, healed, [model, cut, recovered]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_scores_are_those_of_each_model_alone(loaded, family):
    model, architecture = loaded(family)
    windows = make_windows(architecture.vocab_size)
    operators, healed, models = make_variants(model, architecture)
    seen = []
    scores = score_variants(
        model,
        architecture,
        SPANS,
        [{}, operators],
        windows,
        batch=2,
        device=torch.device("cpu"),
        healed=[{}, healed],
        advance=seen.append,
    )
    assert seen == [48, 48, 24]
    targets = torch.from_numpy(windows.tokens.astype(np.int64))
    logits = [logits_of(one, windows) for one in models]
    dense = torch.log_softmax(logits[0], -1)
    for found, own in zip(scores, logits, strict=True):
        got = torch.log_softmax(own, -1)
        nats = -got[:, :-1].gather(-1, targets[:, 1:, None]).sum((1, 2))
        np.testing.assert_allclose(found.perplexity.nats_per_window, nats, rtol=1e-5)
        assert found.perplexity.num_tokens == 5 * 23
        kl = (dense.exp() * (dense - got)).sum(-1).mean(-1)
        np.testing.assert_allclose(found.kl, kl, rtol=1e-3, atol=1e-7)
        same = (own.argmax(-1) == logits[0].argmax(-1)).double().mean(-1)
        np.testing.assert_allclose(found.top1, same, atol=1e-12)
    assert (scores[0].kl == 0).all()
    assert (scores[0].top1 == 1).all()
    assert (scores[1].kl > 1e-4).all()
    assert not np.allclose(scores[1].kl, scores[2].kl, rtol=0.05)
    # The model is the dense one again.
    assert torch.equal(logits_of(model, windows), logits[0])


def test_a_loss_that_is_not_finite_is_named(loaded):
    model, architecture = loaded("llama")
    windows = make_windows(architecture.vocab_size)
    broken = {SPANS[0]: Repair(weight_CC=torch.full((architecture.hidden_size,) * 2, np.nan))}
    with pytest.raises(NonFiniteLossError, match=r"window 0 of random\.txt"):
        score_variants(
            model, architecture, SPANS, [{}, broken], windows, batch=2, device=torch.device("cpu")
        )
