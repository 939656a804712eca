"""lm-evaluation-harness on a trained model, recovered, and real text: its figures and ours."""

import json
import math

import pytest
import transformers
from local_tasks import bos_windows, continuations, write_choices, write_rolling

from ghost_dist.config_file import load_config
from ghost_dist.pipeline.recover import recover

pytest.importorskip("lm_eval", reason="the extra harness is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LENGTH = 256


def test_tasks_of_the_recovered_model_agree_with_our_perplexity(shared, tmp_path):
    model, text = shared / "models" / "wiki-llama-32l", shared / "data" / "wikitext2-test.txt"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = bos_windows(text, tokenizer, windows=8, window_length=LENGTH)
    assert len(texts) >= 4
    tasks = [
        write_rolling(tmp_path, texts.values()),
        write_choices(tmp_path, continuations(text.read_text(encoding="utf-8"), 4)),
    ]
    result = recover(
        load_config(
            None,
            {
                "model.path": str(model),
                "model.dtype": "float32",
                "calibration.source": str(shared / "data" / "calibration.txt"),
                "calibration.sampling": "beginning",
                "calibration.windows": 64,
                "calibration.window_length": LENGTH,
                "calibration.window_bos": True,
                "selection.spans": [[11, 18]],
                "operator.name": "ghost",
                "operator.features": "stream",
                "operator.choose": "residual",
                "evaluation.corpora": {"wikitext2": str(text)},
                "evaluation.windows": 8,
                "evaluation.window_length": LENGTH,
                "evaluation.tasks": [str(task) for task in tasks],
                "engine.device": "cpu",
                "output.path": str(tmp_path / "run"),
            },
        )
    )
    stage = json.loads((tmp_path / "run" / "stages" / "evaluate.json").read_text())
    num_bytes = sum(len(text.encode()) for text in texts.values())
    for variant in ("dense", "pruned", "recovered"):
        nats = stage["outputs"]["nats_per_window"]["wikitext2"][variant]
        ours = math.exp(math.fsum(nats[number] for number in texts) / num_bytes)
        found = result["tasks"]["local_text"][variant]["metrics"]["byte_perplexity"]["value"]
        assert found == pytest.approx(ours, rel=1e-5)
    values = result["perplexity"]["wikitext2"]
    assert 20 < values["dense"] < values["recovered"] < values["pruned"] < 200
    agreement = result["agreement"]["wikitext2"]
    assert agreement["recovered"]["kl"] < agreement["pruned"]["kl"]
    assert agreement["recovered"]["top1"] > agreement["pruned"]["top1"] > 0.3
    accuracies = [
        row["metrics"]["acc"]["value"] for row in result["tasks"]["local_choice"].values()
    ]
    assert accuracies[0] > 0.3  # a quarter by chance
