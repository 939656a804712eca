"""A run on a checkpoint in FP8 ends in the bits of a run on its bfloat16 twin."""

import json

import pytest
import torch
import transformers
from block_scaled import FORMS, recover_both, weights

from ghost_dist.pipeline import stages


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


def test_room_is_asked_for_what_will_be_written(make_config, tmp_path, monkeypatch):
    """In bfloat16, and without the layers that go."""
    asked = []
    monkeypatch.setattr(stages, "check_disk_space", lambda _, needs: asked.append(needs))
    written = weights(recover_both(make_config, tmp_path, "llama", operator__name="none"))
    nbytes = sum(tensor.nbytes for tensor in written.values())
    assert [needs["checkpoint"] for needs in asked] == [nbytes] * 3
