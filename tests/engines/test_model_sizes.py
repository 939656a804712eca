"""Sizes against what really is loaded, computed and written."""

import pytest
import torch
import transformers
from families import FAMILIES, NUM_LAYERS, random_tokens
from torch.utils.flop_counter import FlopCounterMode

from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.engines.model_sizes import model_sizes
from ghost_dist.engines.resident import load_decoder

CPU = torch.device("cpu")
WITH_SCANS = {"bamba", "falcon_h1"}


def distinct_bytes(model):
    tensors = {id(t): t for t in (*model.parameters(), *model.state_dict(keep_vars=True).values())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_the_tensors_that_are_loaded(checkpoint, family, dtype):
    source, architecture = checkpoint(family)
    sizes = model_sizes(source, architecture, dtype)
    for num_layers in (1, 4, NUM_LAYERS):
        decoder = load_decoder(
            source.path, architecture, num_layers=num_layers, dtype=dtype, device=CPU
        )
        assert sizes.decoder_bytes(num_layers) == distinct_bytes(decoder.model)
        for layer, size in zip(decoder.layers, sizes.layers, strict=False):
            assert size.loaded_bytes == distinct_bytes(layer)
    model = load_causal_lm(source.path, dtype=dtype, device=CPU)
    assert sizes.causal_lm_bytes == distinct_bytes(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_bytes_add_up_to_the_checkpoint(checkpoint, family):
    source, architecture = checkpoint(family)
    sizes = model_sizes(source, architecture, torch.float32)
    assert sizes.stored_bytes == source.nbytes
    above = sum(map(source.stored_bytes, architecture.above_in_files))
    assert sizes.decoder_stored_bytes(NUM_LAYERS) + above == source.nbytes
    assert all(layer.stored_bytes > 0 for layer in sizes.layers)
    # float32 checkpoints, so the two differ by buffers of the model at most
    assert sizes.decoder_bytes(3) == pytest.approx(sizes.decoder_stored_bytes(3), rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [32, 96])
def test_flops_are_those_that_torch_counts(checkpoint, family, length):
    """Eager attention and eager experts, whose products the counter sees one by one."""
    source, architecture = checkpoint(family)
    sizes = model_sizes(source, architecture, torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.path, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    ids = random_tokens(2, length)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    products = sum(
        flops
        for operation, flops in counts.items()
        if family not in WITH_SCANS or operation in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    layers = sum(layer.flops(length) for layer in sizes.layers)
    if family in WITH_SCANS:  # torch counts their scans as bmm, as it does attention
        convolutions = [p for n, p in model.named_parameters() if n.endswith("conv1d.weight")]
        layers = sum(layer.matmul_flops for layer in sizes.layers)
        layers -= sum(2 * weight.numel() for weight in convolutions)
    # Some versions of transformers compute the angles of rotary positions by a product, too.
    expected = ids.numel() * (layers + sizes.head_flops)
    assert expected <= products <= expected * 1.0001
