"""A run on a checkpoint in block-scaled FP8 ends in the bits of a run on its bfloat16 twin."""

import json

import pytest
import torch
import transformers
from block_scaled import save_in_fp8
from families import TEXT, save_checkpoint, save_tokenizer
from safetensors.torch import load_file

from ghost_dist.pipeline.recover import recover


def weights(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("operator", ["ghost", "ghost-joint"])
@pytest.mark.parametrize("kind", ["resident", "streaming"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_the_same_operators_and_export(make_config, tmp_path, family, kind, operator):
    source = save_checkpoint(family, tmp_path / "source", torch.bfloat16)
    save_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert save_in_fp8(source, tmp_path / "stored", tmp_path / "twin", (40, 28)) > 10
    for name in ("stored", "twin"):
        recover(
            make_config(
                model__path=str(tmp_path / name),
                calibration__source=str(text),
                calibration__windows=8,
                calibration__window_length=32,
                selection__spans=[[2, 4]],
                operator__name=operator,
                engine__kind=kind,
                output__path=str(tmp_path / f"run-{name}"),
            )
        )
    stored, twin = (tmp_path / f"run-{name}" / "checkpoint" for name in ("stored", "twin"))
    found, expected = weights(stored), weights(twin)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    config = json.loads((stored / "config.json").read_text())
    assert "quantization_config" not in config
    model = transformers.AutoModelForCausalLM.from_pretrained(stored, trust_remote_code=True)
    assert model(torch.arange(3, 20)[None]).logits.isfinite().all()
