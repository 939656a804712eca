"""A run on a checkpoint in FP8 ends in the bits of a run on its bfloat16 twin."""

import json

import pytest
import torch
import transformers
from block_scaled import FORMS, recover_both


@pytest.mark.parametrize("operator", ["ghost", "ghost-joint"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_the_same_operators_and_export(make_config, tmp_path, family, operator):
    stored = recover_both(make_config, tmp_path, family, operator__name=operator)
    config = json.loads((stored / "config.json").read_text())
    assert "quantization_config" not in config
    model = transformers.AutoModelForCausalLM.from_pretrained(stored, trust_remote_code=True)
    assert model(torch.arange(3, 20)[None]).logits.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_scales_of_tensors_and_rows(make_config, tmp_path, form):
    recover_both(make_config, tmp_path, "llama", form, operator__name="fold")
