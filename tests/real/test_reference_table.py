"""The design's reference table on a trained 32-layer model: one span, 8 windows of one corpus.

The figures are of a run whose 32 windows gave the table's 34.25, 59.14 and 43.50.

All spans and both corpora: ``python tests/benchmarks/reference_table.py``, about ten minutes on 2
cores.
"""

import json
import math
import subprocess
import sys

import pytest
import torch
import transformers

from ghost_dist.config_file import load_config
from ghost_dist.pipeline.recover import recover

WINDOWS = 8
TABLE = {"dense": 35.68, "pruned": 59.72, "recovered": 43.99}


def plain_nats(folder, text, windows):
    """Of each window, in a fresh process with nothing but transformers."""
    code = f"""
import json, torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(
    {str(folder)!r}, trust_remote_code=True)
model = transformers.AutoModelForCausalLM.from_pretrained(
    {str(folder)!r}, trust_remote_code=True, dtype=torch.float32)
text = open({str(text)!r}, encoding="utf-8").read()
ids = tokenizer(text, add_special_tokens=False)["input_ids"][: {windows} * 1024]
tokens = torch.tensor(ids).view({windows}, 1024)
nats = []
with torch.inference_mode():
    for window in tokens.split(1):
        logits = model(window, use_cache=False).logits
        nats.append(torch.nn.functional.cross_entropy(
            logits[0, :-1], window[0, 1:], reduction="sum").item())
print(json.dumps(nats))
"""
    output = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,  # a question would be a failure
        text=True,
        cwd="/",
    )
    return json.loads(output.stdout.splitlines()[-1])


@pytest.mark.timeout(900)
def test_reference_figures_and_the_exported_checkpoint(shared, tmp_path):
    data = shared / "data"
    config = load_config(
        None,
        {
            "model.path": str(shared / "models" / "wiki-llama-32l"),
            "model.dtype": "float32",
            "calibration.source": str(data / "calibration.txt"),
            "calibration.sampling": "beginning",
            "calibration.windows": 64,
            "calibration.window_length": 1024,
            "selection.spans": "11:18",
            "operator.name": "ghost",
            "operator.features": "stream",
            "operator.ridge": {"absolute": 1e-6},
            "operator.choose": "residual",
            "engine.device": "cpu",
            "evaluation.corpora": {"wikitext2": str(data / "wikitext2-test.txt")},
            "evaluation.windows": WINDOWS,
            "evaluation.window_length": 1024,
            "output.path": str(tmp_path / "run"),
        },
    )
    result = recover(config)
    found = result["perplexity"]["wikitext2"]
    for variant, value in TABLE.items():
        assert found[variant] == pytest.approx(value, rel=5e-3)
    stage = json.loads((tmp_path / "run" / "stages" / "evaluate.json").read_text())
    nats = stage["outputs"]["nats_per_window"]["wikitext2"]["recovered"]
    assert math.exp(sum(nats) / (WINDOWS * 1023)) == pytest.approx(found["recovered"])
    plain = plain_nats(tmp_path / "run" / "checkpoint", data / "wikitext2-test.txt", 4)
    assert plain == pytest.approx(nats[:4], rel=1e-3)
    assert math.isfinite(result["fit"][0]["condition"])
    assert transformers.__version__ == result["versions"]["transformers"]
    assert torch.__version__.startswith(result["versions"]["torch"].split("+")[0])
