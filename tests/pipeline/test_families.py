"""``recover`` from end to end on every family: what is exported reloads and is better than the cut.

The reload is checked by the run itself, in a process without ghost_dist; here the result is looked
at from outside.
"""

import json

import pytest
import torch
import transformers
from families import FAMILIES, TEXT, VOCAB, save_checkpoint, save_tokenizer

from ghost_dist.config_file import load_config
from ghost_dist.pipeline.recover import recover


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_recovered(family, tmp_path):
    model = tmp_path / "model"
    save_checkpoint(family, model)
    save_tokenizer(model)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    run = tmp_path / "run"
    result = recover(
        load_config(
            None,
            {
                "model.path": str(model),
                "calibration.source": str(text),
                "calibration.windows": 32,
                "calibration.window_length": 64,
                "calibration.window_bos": True,
                "selection.spans": [[1, 2], [4, 5]],
                "operator.choose": "residual",  # by KL: test_operators.py
                "engine.device": "cpu",
                "output.path": str(run),
            },
        )
    )
    config = json.loads((run / "checkpoint" / "config.json").read_text())
    assert config["model_type"].startswith("ghost_")
    assert all(fit["residual"] < 1 for fit in result["fit"]), "no better than the plain cut"
    tokens = torch.randint(3, VOCAB - 30, (1, 16), generator=torch.Generator().manual_seed(1))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        run / "checkpoint", trust_remote_code=True, dtype=torch.float32
    )
    assert torch.isfinite(loaded(tokens).logits).all()
