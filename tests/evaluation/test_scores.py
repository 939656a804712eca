"""Scores against plain logits of models that are really cut, and against known values."""

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.surgery import insert_operators, remove_layers
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.evaluation import scores as module
from ghost_dist.evaluation.scores import NonFiniteLossError, Scores, corpus_scores, window_scores
from ghost_dist.spans import Span

pytestmark = pytest.mark.model

VOCAB, WIDTH = 96, 32
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "Llama": transformers.LlamaConfig(**GROUPED),
    "Gemma2": transformers.Gemma2Config(
        **GROUPED, final_logit_softcapping=2.0, layer_types=["sliding_attention", "full_attention"]
    ),
    "Cohere": transformers.CohereConfig(**GROUPED, logit_scale=0.5),
    "Granite": transformers.GraniteConfig(**GROUPED, logits_scaling=3.0),
    "GPTNeoX": transformers.GPTNeoXConfig(**COMMON),
    "Mixtral": transformers.MixtralConfig(**GROUPED, num_local_experts=4),
    # Its head asks the decoder inside of the body, so the body has to run with it.
    "OPT": transformers.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=WIDTH, init_std=0.3),
}


def make_model(family, dtype=torch.float32):
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).to(dtype).eval()


@pytest.fixture(scope="module")
def perplexity(tmp_path_factory):
    """Scores of a model alone; its family is looked at once."""
    architectures = {}

    def measure(model, windows, batch, **arguments):
        family = type(model)
        if family not in architectures:
            folder = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder)
            architectures[family] = inspect_architecture(open_checkpoint(folder))
        layers = LayerwiseModel(model, architectures[family])
        [found] = corpus_scores(layers, [Variant()], {"": windows}, batch=batch, **arguments)[""]
        return found

    return measure


def make_windows(count=5, length=24, vocab_size=VOCAB):
    tokens = np.random.default_rng(0).integers(0, vocab_size, (count, length), dtype=np.int32)
    return TokenWindows(tokens, "random.txt")


def plain_nats(model, windows):
    with torch.no_grad():
        nats = []
        for row in torch.from_numpy(windows.tokens.astype(np.int64)):
            logits = model(row[None]).logits[0, :-1].float()
            nats.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item())
    return np.array(nats)


@pytest.mark.parametrize("entries", [1, 7 * VOCAB, 1 << 25])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_cross_entropy_of_plain_logits(family, entries, monkeypatch, perplexity):
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", entries)
    model, windows = make_model(family), make_windows()
    result = perplexity(model, windows, batch=2)
    expected = plain_nats(model, windows)
    np.testing.assert_allclose(result.nats, expected, rtol=2e-6)
    assert result.num_tokens == 5 * 23
    assert result.perplexity == pytest.approx(math.exp(expected.sum() / (5 * 23)), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_sees_few_tokens_at_a_time(family, monkeypatch, perplexity):
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 20 * VOCAB)
    model, seen = make_model(family), []
    model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.numel() // VOCAB)
    )
    perplexity(model, make_windows(4, 24), batch=4)
    assert seen[-5:] == [20, 20, 20, 20, 16]
    assert max(seen) == 20, "those before are of the trial"


def test_a_batch_may_have_more_tokens_than_the_model_has_positions(perplexity):
    """Its head asks the body, which takes what it is given for one text."""
    model, windows = make_model("OPT"), make_windows()
    assert windows.tokens.size > model.config.max_position_embeddings
    result = perplexity(model, windows, batch=5)
    np.testing.assert_allclose(result.nats, plain_nats(model, windows), rtol=2e-6)


def test_a_model_that_names_no_body(monkeypatch, perplexity):
    model, windows = make_model("Llama"), make_windows()
    monkeypatch.setattr(type(model), "base_model_prefix", "")
    assert model.base_model is model
    result = perplexity(model, windows, batch=2)
    np.testing.assert_allclose(result.nats, plain_nats(model, windows), rtol=2e-6)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("family", ["Llama", "OPT"])
def test_the_body_runs_once_a_batch(family, perplexity):
    model, calls = make_model(family), []
    linear = next(part for part in model.modules() if isinstance(part, torch.nn.Linear))
    linear.register_forward_hook(
        lambda _module, inputs, _output: calls.append(inputs[0].shape[:-1].numel())
    )
    perplexity(model, make_windows(5, 24), batch=2)
    assert [tokens for tokens in calls if tokens >= 24] == [2 * 24, 2 * 24, 24]


def test_the_batch_does_not_matter(perplexity):
    model, windows = make_model("Gemma2"), make_windows()
    results = [perplexity(model, windows, batch=b) for b in (1, 3, 8)]
    for result in results[1:]:
        np.testing.assert_allclose(result.nats, results[0].nats, rtol=2e-6)


def test_sums_of_disjoint_windows_add_up(perplexity):
    model, windows = make_model("Llama"), make_windows(6)
    parts = [TokenWindows(windows.tokens[part].copy(), "") for part in (slice(2), slice(2, 6))]
    whole = perplexity(model, windows, batch=2)
    pieces = [perplexity(model, part, batch=2) for part in parts]
    assert sum(p.num_tokens for p in pieces) == whole.num_tokens
    assert sum(p.nats.sum() for p in pieces) == pytest.approx(whole.nats.sum(), rel=1e-9)


def test_a_model_that_knows_nothing(perplexity):
    model = make_model("Llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, make_windows(), batch=2)
    assert result.perplexity == pytest.approx(VOCAB, rel=1e-6)


def test_only_the_last_tokens_are_predicted(perplexity):
    # The model is sure that id i is followed by i + 1: only a shift by one gives loss 0.
    model = make_model("Llama")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    codes = torch.nn.functional.normalize(torch.randn(VOCAB, WIDTH), dim=1)
    model.model.embed_tokens.weight.data = codes
    model.lm_head.weight.data = 100.0 * codes.roll(1, 0)  # id i makes i + 1 likely
    tokens = (np.arange(24, dtype=np.int32) + np.array([[3], [9]], dtype=np.int32)) % VOCAB
    result = perplexity(model, TokenWindows(tokens, ""), batch=2)
    assert result.perplexity == pytest.approx(1.0, abs=1e-3)


def test_loss_is_taken_in_float32(perplexity):
    model, windows = make_model("Llama", torch.bfloat16), make_windows()
    result = perplexity(model, windows, batch=1)
    np.testing.assert_allclose(result.nats, plain_nats(model, windows), rtol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "OPT"])
def test_the_window_with_a_loss_that_is_not_finite_is_named(family, perplexity):
    model = make_model(family)
    windows = make_windows(5)
    tokens = np.minimum(windows.tokens, VOCAB - 2)
    tokens[3, 5] = VOCAB - 1
    model.get_input_embeddings().weight.data[VOCAB - 1] = math.nan
    if family == "OPT":  # tied
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, WIDTH))
    with pytest.raises(NonFiniteLossError, match="window 3 of text.txt is not finite") as caught:
        perplexity(model, TokenWindows(tokens, "text.txt"), batch=2)
    assert "forward" not in model.base_model.__dict__
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_before_and_without_dropout(training, perplexity):
    model = make_model("GPTNeoX")
    windows = make_windows()
    expected = perplexity(model, windows, batch=2).perplexity
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    own_forward = model.base_model.forward
    model.base_model.forward = own_forward  # as accelerate's hooks do
    model.train(training)
    result = perplexity(model, windows, batch=2)
    assert result.perplexity == pytest.approx(expected)
    assert model.training == training
    assert model.base_model.__dict__["forward"] is own_forward


def test_progress_counts_every_token_once(perplexity):
    seen = []
    perplexity(make_model("Llama"), make_windows(5), batch=2, advance=seen.append)
    assert sum(seen) == 5 * 24


def test_windows_of_two_tokens(perplexity):
    model, windows = make_model("Llama"), make_windows(3, 2)
    result = perplexity(model, windows, batch=2)
    np.testing.assert_allclose(result.nats, plain_nats(model, windows), rtol=2e-6)


def test_a_perplexity_beyond_float64_is_infinite():
    assert Scores(np.array([1e6]), np.zeros(1), np.ones(1), 10, np.zeros(1)).perplexity == math.inf


SPANS = (Span(1, 2), Span(3, 4))


def logits_of(model, windows):
    with torch.no_grad():
        ids = torch.from_numpy(windows.tokens.astype(np.int64))
        return model.eval()(ids).logits.double()


def make_variants(model, architecture):
    """A recovered model with a new down_proj, and the three models as they are exported."""
    torch.manual_seed(2)
    width = architecture.hidden_size
    operators = {
        span: Repair(weight_CC=torch.eye(width) + 0.1 * torch.randn(width, width)) for span in SPANS
    }
    layer = SPANS[-1].start - 1
    path = architecture.down_projections.get(layer)
    if path is not None:
        module = model.get_submodule(architecture.layers)[layer].get_submodule(path)
        down_FC = 1.5 * module.weight.detach().T.clone()
        operators[SPANS[-1]] = replace(operators[SPANS[-1]], down_FC=down_FC)
    cut, recovered = copy.deepcopy(model), copy.deepcopy(model)
    remove_layers(cut, architecture, SPANS)
    remove_layers(recovered, architecture, SPANS)
    variant = Variant(SPANS, operators)
    insert_operators(recovered, architecture, variant)
    return variant, [model, cut, recovered]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_scores_are_those_of_each_model_alone(loaded, family):
    model, architecture = loaded(family)
    windows = make_windows(vocab_size=architecture.vocab_size)
    recovered, models = make_variants(model, architecture)
    seen = []
    variants = [Variant(), Variant(SPANS), recovered]
    layers = LayerwiseModel(model, architecture)
    scores = window_scores(layers, variants, windows.tokens, batch=2, advance=seen.append)
    assert sum(seen) == windows.tokens.size
    targets = torch.from_numpy(windows.tokens.astype(np.int64))
    logits = [logits_of(one, windows) for one in models]
    dense = torch.log_softmax(logits[0], -1)
    for found, own in zip(scores, logits, strict=True):
        got = torch.log_softmax(own, -1)
        nats = -got[:, :-1].gather(-1, targets[:, 1:, None]).sum((1, 2))
        np.testing.assert_allclose(found.nats, nats, rtol=1e-5)
        assert found.num_tokens == 5 * 23
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


def test_positions_count_as_much_as_the_dense_model_is_sure(loaded):
    model, architecture = loaded("llama")
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.weight.data *= 10  # some positions of one likely token, some of many
    windows = make_windows(vocab_size=architecture.vocab_size)
    variants = [Variant(), Variant(SPANS)]
    found = window_scores(LayerwiseModel(model, architecture), variants, windows.tokens, batch=2)
    cut = copy.deepcopy(model)
    remove_layers(cut, architecture, SPANS)
    dense, got = (torch.log_softmax(logits_of(one, windows), -1) for one in (model, cut))
    sure = ((dense.exp() * dense).sum(-1)).exp()
    assert sure.max() > 3 * sure.min()
    kl = (dense.exp() * (dense - got)).sum(-1)
    expected = (kl * sure).sum(-1) / sure.sum(-1)
    np.testing.assert_allclose(found[1].sure_kl, expected, rtol=1e-3)
    assert not np.allclose(found[1].sure_kl, found[1].kl, rtol=0.05)
    assert (found[0].sure_kl == 0).all()


def test_a_variant_whose_loss_is_not_finite_is_named(loaded):
    model, architecture = loaded("llama")
    windows = make_windows(vocab_size=architecture.vocab_size)
    broken = {SPANS[0]: Repair(weight_CC=torch.full((architecture.hidden_size,) * 2, np.nan))}
    with pytest.raises(NonFiniteLossError, match=r"window 0 of random\.txt"):
        corpus_scores(
            LayerwiseModel(model, architecture), [Variant(SPANS, broken)], {"": windows}, batch=2
        )
