"""Perplexity against the cross entropy of plain logits, and against values known beforehand."""

import math
import pickle

import numpy as np
import pytest
import torch
import transformers

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.evaluation import perplexity as module
from ghost_dist.evaluation.perplexity import NonFiniteLossError, perplexity

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
    # Its head asks the decoder inside of the body, so it cannot be run in chunks.
    "OPT": transformers.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=WIDTH, init_std=0.3),
}


def make_model(family, dtype=torch.float32):
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).to(dtype).eval()


def make_windows(count=5, length=24):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (count, length), dtype=np.int32)
    return TokenWindows(tokens, "random")


def plain_nats(model, windows):
    with torch.no_grad():
        nats = []
        for row in torch.from_numpy(windows.tokens.astype(np.int64)):
            logits = model(row[None]).logits[0, :-1].float()
            nats.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item())
    return np.array(nats)


@pytest.mark.parametrize("entries", [1, 7 * VOCAB, 1 << 25])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_cross_entropy_of_plain_logits(family, entries, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", entries)
    model, windows = make_model(family), make_windows()
    result = perplexity(model, windows, batch=2, device="cpu")
    expected = plain_nats(model, windows)
    np.testing.assert_allclose(result.nats_per_window, expected, rtol=2e-6)
    assert result.num_tokens == 5 * 23
    assert result.nats_sum == pytest.approx(expected.sum(), rel=2e-6)
    assert result.value == pytest.approx(math.exp(expected.sum() / (5 * 23)), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_sees_few_tokens_at_a_time(family, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 20 * VOCAB)
    model, seen = make_model(family), []
    model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.numel() // VOCAB)
    )
    perplexity(model, make_windows(4, 24), batch=4, device="cpu")
    predictions = seen[2:]  # two for the trial
    if family == "OPT":
        assert predictions == [4 * 24]
    else:
        assert predictions == [20, 20, 20, 20, 16]


def test_a_model_that_names_no_body(monkeypatch):
    model, windows = make_model("Llama"), make_windows()
    monkeypatch.setattr(type(model), "base_model_prefix", "")
    assert model.base_model is model
    result = perplexity(model, windows, batch=2, device="cpu")
    np.testing.assert_allclose(result.nats_per_window, plain_nats(model, windows), rtol=2e-6)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("family", ["Llama", "OPT"])
def test_the_body_runs_once_a_batch(family):
    model, calls = make_model(family), []
    model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: calls.append(tuple(inputs[0].shape))
    )
    perplexity(model, make_windows(5, 24), batch=2, device="cpu")
    assert [shape for shape in calls if shape[1] == 24] == [(2, 24), (2, 24), (1, 24)]


def test_the_batch_does_not_matter():
    model, windows = make_model("Gemma2"), make_windows()
    results = [perplexity(model, windows, batch=b, device="cpu") for b in (1, 3, 8)]
    for result in results[1:]:
        np.testing.assert_allclose(result.nats_per_window, results[0].nats_per_window, rtol=2e-6)


def test_sums_of_disjoint_windows_add_up():
    model, windows = make_model("Llama"), make_windows(6)
    parts = [TokenWindows(windows.tokens[part].copy(), "") for part in (slice(2), slice(2, 6))]
    whole = perplexity(model, windows, batch=2, device="cpu")
    pieces = [perplexity(model, part, batch=2, device="cpu") for part in parts]
    assert sum(p.num_tokens for p in pieces) == whole.num_tokens
    assert sum(p.nats_sum for p in pieces) == pytest.approx(whole.nats_sum, rel=1e-9)


def test_a_model_that_knows_nothing():
    model = make_model("Llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, make_windows(), batch=2, device="cpu")
    assert result.value == pytest.approx(VOCAB, rel=1e-6)


def test_only_the_last_tokens_are_predicted():
    # The model is sure that id i is followed by i + 1: only a shift by one gives loss 0.
    model = make_model("Llama")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    codes = torch.nn.functional.normalize(torch.randn(VOCAB, WIDTH), dim=1)
    model.model.embed_tokens.weight.data = codes
    model.lm_head.weight.data = 100.0 * codes.roll(1, 0)  # id i makes i + 1 likely
    tokens = (np.arange(24, dtype=np.int32) + np.array([[3], [9]], dtype=np.int32)) % VOCAB
    result = perplexity(model, TokenWindows(tokens, ""), batch=2, device="cpu")
    assert result.value == pytest.approx(1.0, abs=1e-3)


def test_loss_is_taken_in_float32():
    model, windows = make_model("Llama", torch.bfloat16), make_windows()
    result = perplexity(model, windows, batch=1, device="cpu")
    np.testing.assert_allclose(result.nats_per_window, plain_nats(model, windows), rtol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "OPT"])
def test_the_window_with_a_loss_that_is_not_finite_is_named(family):
    model = make_model(family)
    windows = make_windows(5)
    tokens = np.minimum(windows.tokens, VOCAB - 2)
    tokens[3, 5] = VOCAB - 1
    model.get_input_embeddings().weight.data[VOCAB - 1] = math.nan
    if family == "OPT":  # tied
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, WIDTH))
    with pytest.raises(NonFiniteLossError, match="window 3 of text.txt is not finite") as caught:
        perplexity(model, TokenWindows(tokens, "text.txt"), batch=2, device="cpu")
    assert "forward" not in model.base_model.__dict__
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.window, str(again)) == (3, str(caught.value))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_before_and_without_dropout(training):
    model = make_model("GPTNeoX")
    windows = make_windows()
    expected = perplexity(model, windows, batch=2, device="cpu").value
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    own_forward = model.base_model.forward
    model.base_model.forward = own_forward  # as accelerate's hooks do
    model.train(training)
    result = perplexity(model, windows, batch=2, device="cpu")
    assert result.value == pytest.approx(expected)
    assert model.training == training
    assert model.base_model.__dict__["forward"] is own_forward


def test_progress_counts_every_token_once():
    seen = []
    perplexity(make_model("Llama"), make_windows(5), batch=2, device="cpu", on_progress=seen.append)
    assert seen == [48, 48, 24]


def test_windows_of_two_tokens():
    model, windows = make_model("Llama"), make_windows(3, 2)
    result = perplexity(model, windows, batch=2, device="cpu")
    np.testing.assert_allclose(result.nats_per_window, plain_nats(model, windows), rtol=2e-6)


def test_a_perplexity_beyond_float64_is_infinite():
    assert module.PerplexityResult(np.array([1e6]), 10).value == math.inf
