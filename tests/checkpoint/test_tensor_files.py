"""FP8 with scales: numbers against a loop over blocks, files against their bfloat16 twin."""

import contextlib
import json

import pytest
import torch
from block_scaled import FORMS, quantise, save_in_fp8
from families import random_tokens, save_checkpoint
from safetensors.torch import load_file, save_file

from ghost_dist.checkpoint import tensor_files
from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.checkpoint.reader import (
    lazy_tensors,
    model_fingerprint,
    open_checkpoint,
    read_tensor,
)
from ghost_dist.checkpoint.tensor_files import dequantised, weight_block
from ghost_dist.checkpoint.weight_reader import WeightReader
from ghost_dist.engines.model_sizes import model_sizes
from ghost_dist.errors import CheckpointError

CPU = torch.device("cpu")
BLOCK = (40, 28)  # no size of the models is a multiple of it
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("at_once", [1, 1 << 24])
@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
@pytest.mark.parametrize(
    "shape", [(160, 129), (129, 160), (256, 384), (1, 1), (128, 300), (127, 1)]
)
def test_each_number_times_the_scale_of_its_block(shape, block, at_once, monkeypatch):
    monkeypatch.setitem(tensor_files._NUMBERS_AT_ONCE, "cpu", at_once)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-3, 3, shape[0])[:, None]  # scales of neighbours differ
    numbers, scales, twin = quantise(weight, block)
    assert torch.equal(dequantised(numbers, scales, block), twin)


@pytest.fixture
def pair(tmp_path):
    """A function from family to its FP8 checkpoint and the twin."""

    def make(family, form=None):
        save_checkpoint(family, tmp_path / "source", torch.bfloat16)
        stored, twin = tmp_path / "stored", tmp_path / "twin"
        assert save_in_fp8(tmp_path / "source", stored, twin, BLOCK, form) > 10
        return stored, twin

    return make


@pytest.mark.parametrize("form", [None, *FORMS])
def test_a_part_is_that_of_the_whole(pair, form, monkeypatch):
    """Any part, also one that begins and ends within blocks; no more than its blocks is scaled."""
    stored, _ = map(open_checkpoint, pair("llama", form))
    sizes, scaled = [], []
    monkeypatch.setattr(
        "ghost_dist.checkpoint.reader.dequantised",
        lambda *given: scaled.append(given[0].shape) or dequantised(*given),
    )
    whole = read_tensor(stored, UP)
    rows, columns = whole.shape
    parts = [slice(0, rows // 2), slice(rows // 2, rows), slice(41, 83), slice(7, 8)]
    with contextlib.ExitStack() as files:
        lazy = lazy_tensors(stored, [UP], files, CPU)[UP]
        assert torch.equal(lazy[...], whole)
        assert torch.equal(lazy[:], whole)
        for part in parts:
            for index in (part, (slice(None), part), (part, slice(3, columns - 1))):
                assert torch.equal(lazy[index], whole[index])
                sizes.append((whole[index].shape, scaled[-1]))
    if form is None:
        assert all(
            got[dim] <= asked[dim] + 2 * BLOCK[dim] for asked, got in sizes for dim in (0, 1)
        )


@pytest.mark.parametrize(
    ("family", "form"),
    [("llama", None), ("deepseek_v3", None), ("qwen3_moe", None), *(("llama", f) for f in FORMS)],
)
def test_every_way_to_read_gives_the_twin(pair, family, form):
    stored, twin = map(open_checkpoint, pair(family, form))
    assert stored.config == twin.config
    assert stored.dtype == torch.bfloat16
    assert stored.tensors.keys() == twin.tensors.keys()
    files = [load_file(path) for path in stored.path.glob("*.safetensors")]
    activations = {name for tensors in files for name in tensors if "activation" in name}
    assert stored.nbytes == sum(
        t.nbytes for tensors in files for n, t in tensors.items() if n not in activations
    )
    assert stored.nbytes < 0.8 * twin.nbytes
    assert stored.bytes_once_read == twin.nbytes == twin.bytes_once_read
    sizes, of_twin = (
        model_sizes(checkpoint, inspect_architecture(checkpoint), torch.float32)
        for checkpoint in (stored, twin)
    )
    assert sizes.stored_bytes == stored.nbytes
    assert sizes.exported_bytes == of_twin.exported_bytes == of_twin.stored_bytes
    assert [la.exported_bytes for la in sizes.layers] == [la.stored_bytes for la in of_twin.layers]
    assert [la.loaded_bytes for la in sizes.layers] == [la.loaded_bytes for la in of_twin.layers]
    with contextlib.closing(WeightReader(stored, CPU)) as reader:
        streamed = reader.start(list(stored.tensors)).wait()
    assert reader.bytes_read == stored.nbytes
    for name in twin.tensors:
        expected = read_tensor(twin, name)
        assert torch.equal(read_tensor(stored, name), expected)
        assert streamed[name].dtype == torch.bfloat16
        assert torch.equal(streamed[name], expected)
    models = [
        load_causal_lm(checkpoint.path, dtype=torch.float32, device=CPU)
        for checkpoint in (stored, twin)
    ]
    logits = [model(random_tokens()).logits for model in models]
    assert torch.equal(*logits)
    assert model_fingerprint(stored) != model_fingerprint(twin)


def test_scales_are_in_the_fingerprint(pair):
    stored, _ = pair("llama")
    before = model_fingerprint(open_checkpoint(stored))
    change(stored, lambda tensors: tensors[f"{UP}_scale_inv"].mul_(2))
    assert model_fingerprint(open_checkpoint(stored)) != before


def change(folder, edit):
    [path] = [p for p in folder.glob("*.safetensors") if UP in load_file(p)]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    kept = {name: file for name, file in places.items() if file != path.name}
    places = kept | dict.fromkeys(tensors, path.name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def without_scales(tensors):
    del tensors[f"{UP}_scale_inv"]


def of_another_block(tensors):
    tensors[f"{UP}_scale_inv"] = torch.ones(1, 1)


def whole_scales(tensors):
    tensors[f"{UP}_scale_inv"] = torch.ones(3, 3, dtype=torch.int32)


def of_another_kind(tensors):
    tensors[UP] = tensors[UP].to(torch.float8_e5m2)


def without_weight(tensors):
    tensors["model.layers.1.mlp.side_proj.weight_scale_inv"] = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_scales, rf"{UP} is FP8, but its scales \({UP}_scale_inv or .* are not there"),
        (of_another_block, r"_scale_inv is F32 of shape \[1, 1\].*of shape \[3, 3\].*40 x 28"),
        (whole_scales, r"_scale_inv is I32"),
        (of_another_kind, rf"{UP} is F8_E5M2 of shape \[96, 64\]"),
        (without_weight, "side_proj.weight_scale_inv are scales of a tensor that is not"),
    ],
)
def test_what_is_wrong_is_named(pair, edit, message):
    stored, _ = pair("llama")
    change(stored, edit)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(stored)


@pytest.mark.parametrize(
    "method",
    [
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [128, 0]},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"},
        {"quant_method": "gptq", "weight_block_size": [128, 128]},
    ],
)
def test_other_methods_are_not_taken_for_it(method):
    assert weight_block({"quantization_config": method}) is None
