"""Matrices before the gaps that attentions and MLPs leave, against sums taken by hooks."""

import numpy as np
import pytest
import torch
from families import oracle, random_operators, random_tokens

from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.find_halves import with_halves
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.pipeline.gaps import CloseGaps, gap_steps, gaps
from ghost_dist.spans import Span, Sublayer, parse_sublayers

TOKENS = random_tokens(rows=12, length=40)
FOLDS = [window % 3 for window in range(len(TOKENS))]
JUDGE = 2


def variant_of(text, spans=()):
    return Variant(spans, random_operators(spans), sublayers=parse_sublayers(text))


def closed(loaded, family, variant, tokens=TOKENS, folds=FOLDS):
    model, architecture = loaded
    layers = LayerwiseModel(model, architecture)
    closing = CloseGaps(
        layers, tokens.numpy().astype(np.int32), 4, folds, judge=JUDGE, variant=variant
    )
    told = []
    steps = gap_steps(variant, architecture)
    closing.take(steps, told.append)
    assert len(told) == len(steps)
    return closing


@pytest.fixture
def open_model(checkpoint, loaded):
    def get(family):
        source, architecture = checkpoint(family)
        return loaded(family)[0], with_halves(source, architecture)

    return get


def test_where_gaps_begin_and_end(open_model):
    _, architecture = open_model("llama")
    variant = variant_of("attention:0,mlp:1,attention:2,mlp:5", (Span(3, 4),))
    assert gaps(variant, architecture) == {
        Sublayer(1, "attention"): (2, True),  # nothing writes before attention:0
        Sublayer(5, "attention"): (6, False),
    }
    assert gaps(Variant(variant.spans), architecture) == {}
    _, sandwiched = open_model("gemma3")
    assert gaps(variant, sandwiched) == {}
    assert gap_steps(variant, sandwiched) == []


def seen_by(model, paths):
    """Function that runs the model and gives what modules got first, (windows x T, width) each."""
    kept = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: kept[path].append(args[0])
        )
        for path in paths
    ]
    with torch.inference_mode():
        model(TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(found).double() for path, found in kept.items()}


def test_the_matrix_is_the_ridge_solution_on_the_recovered_stream(open_model):
    """Two gaps: the stream behind the second one's matrix comes from the closed first one."""
    model, architecture = open_model("llama")
    variant = variant_of("attention:2,mlp:4")
    closing = closed((model, architecture), "llama", variant)
    ends = {  # the matrix, and what reads the stream behind the gap
        Sublayer(1, "mlp"): ("mlp.down_proj", "model.layers.2.post_attention_layernorm"),
        Sublayer(4, "attention"): ("self_attn.o_proj", "model.layers.5.input_layernorm"),
    }
    assert set(closing.outputs) <= set(ends)
    assert [row["before"] for row in closing.rows] == ["mlp:1", "attention:4"]
    fitted = torch.tensor([fold != JUDGE for fold in FOLDS])
    targets = seen_by(model, [reader for _, reader in ends.values()])
    for before, (path, reader) in ends.items():
        if before not in closing.outputs:
            continue
        writer = f"model.layers.{before.layer}.{path}"
        module = model.get_submodule(writer)
        with oracle(model, architecture.layers, (), {}, sublayers=variant.sublayers):
            found = seen_by(model, [writer, reader])
        weight_FC, new_FC = module.weight.T.double(), closing.outputs[before]
        h_TF = found[writer][fitted].flatten(0, 1)
        left_TC = (targets[reader] - found[reader])[fitted].flatten(0, 1) + h_TF @ weight_FC
        # Stationary: the gradient of the squared error is that of the ridge, by one factor.
        gradient, shrunk = h_TF.T @ (left_TC - h_TF @ new_FC), new_FC - weight_FC
        factor = (gradient * shrunk).sum() / shrunk.square().sum()
        assert factor > 0
        assert (gradient - factor * shrunk).norm() < 1e-3 * gradient.norm()
        module.weight.data = new_FC.T.float()
    assert closing.outputs


def test_a_matrix_that_cannot_be_bettered_stays(open_model):
    """Two tokens a fold tell nothing of the third: the old matrix is better there and is kept."""
    model, architecture = open_model("llama")
    variant, kept = variant_of("attention:2,mlp:4"), []
    for seed in range(6):
        tokens = random_tokens(rows=3, length=2, seed=seed)
        closing = closed((model, architecture), "llama", variant, tokens, [0, 1, 2])
        kept += [row["kept"] for row in closing.rows]
        assert all(row["kept"] == (row["residual"] < 1) for row in closing.rows)
        named = {row["before"] for row in closing.rows if row["kept"]}
        assert named == set(map(str, closing.outputs))
    assert not all(kept)
