"""Cut models in memory against the uncut model whose removed layers are told to do nothing."""

import numpy as np
import pytest
import torch
from families import (
    CUTS,
    FAMILIES,
    NUM_LAYERS,
    REPAIR_KINDS,
    oracle_logits,
    random_operators,
    random_repairs,
    random_tokens,
    rounding,
)

from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.surgery import insert_operators, remove_layers
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.evaluation.scores import last_logits

CPU = torch.device("cpu")
TOKENS = random_tokens()


def load(source, dtype=torch.float32):
    return load_causal_lm(source.path, dtype=dtype, device=CPU)


def logits(model, tokens=TOKENS):
    with torch.inference_mode():
        return torch.cat([model(row[None], use_cache=False).logits for row in tokens])


def swept(model, architecture, variant):
    """Logits of a variant of an uncut model, layer by layer."""
    tokens = TOKENS.numpy().astype(np.int32)
    return last_logits(LayerwiseModel(model, architecture), variant, tokens, lambda _: None)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_and_recovered(checkpoint, family, cut):
    source, architecture = checkpoint(family)
    spans, operators = CUTS[cut], random_operators(CUTS[cut])
    model = load(source)
    pruned = oracle_logits(model, architecture.layers, spans, {}, TOKENS)
    recovered = oracle_logits(model, architecture.layers, spans, operators, TOKENS)
    assert (pruned - recovered).abs().max() > 1e-2 * pruned.abs().max()
    remove_layers(model, architecture, spans)
    assert (logits(model) - pruned).abs().max() <= rounding(pruned)
    insert_operators(model, architecture, Variant(spans, operators))
    assert (logits(model) - recovered).abs().max() <= rounding(recovered)
    arguments = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    cached = model.generate(TOKENS[:1], use_cache=True, **arguments)
    assert torch.equal(cached, model.generate(TOKENS[:1], use_cache=False, **arguments))


@pytest.mark.parametrize("kind", REPAIR_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_repair_in_the_cut_and_in_the_uncut_model(checkpoint, family, kind):
    source, architecture = checkpoint(family)
    spans = CUTS["two"]
    repairs = random_repairs(kind, spans, architecture)
    model = load(source)
    dense = logits(model)
    expected = oracle_logits(model, architecture.layers, spans, repairs, TOKENS)
    assert (swept(model, architecture, Variant(spans, repairs)) - expected).abs().max() <= rounding(
        expected
    )
    assert torch.equal(logits(model), dense)
    remove_layers(model, architecture, spans)
    insert_operators(model, architecture, Variant(spans, repairs))
    assert (logits(model) - expected).abs().max() <= rounding(expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "gpt_oss"])
def test_cut_model_saves_and_loads_as_its_family(checkpoint, tmp_path, family):
    """The configuration in memory is cut too: transformers itself reloads the pruned model."""
    source, architecture = checkpoint(family)
    model = load(source)
    remove_layers(model, architecture, CUTS["two"])
    model.save_pretrained(tmp_path)
    again = load_causal_lm(tmp_path, dtype=torch.float32, device=CPU)
    assert torch.equal(logits(again), logits(model))
    assert again.config.num_hidden_layers == NUM_LAYERS - 3


def test_precision_of_operators(checkpoint):
    """float32 operators are computed in float32, others in the dtype of the model."""
    source, architecture = checkpoint("llama")
    spans = CUTS["middle"]
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = {}
    exact = random_operators(spans)[spans[0]]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = load(source, torch.bfloat16)
        remove_layers(model, architecture, spans)
        operator = Repair(exact.weight_CC.to(dtype))
        insert_operators(model, architecture, Variant(spans, {spans[0]: operator}))
        layer = model.get_submodule(architecture.layers)[spans[0].start]
        hook = next(iter(layer._forward_pre_hooks.values()))
        (seen[dtype], *_), _ = hook(layer, (x,), {})
        assert seen[dtype].dtype == torch.bfloat16
    transposed = exact.weight_CC.T.contiguous()
    in_float32 = torch.nn.functional.linear(x.float(), transposed).bfloat16()
    in_bfloat16 = torch.nn.functional.linear(x, transposed.bfloat16())
    assert torch.equal(seen[torch.float32], in_float32)
    assert torch.equal(seen[torch.bfloat16], in_bfloat16)
    assert torch.equal(seen[torch.float64], in_bfloat16)
    assert not torch.equal(in_float32, in_bfloat16)
