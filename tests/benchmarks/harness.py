"""The example of docs/evaluation.md: a recovered model, two local tasks, and our figures beside.

python tests/benchmarks/harness.py ../shared OUT
"""

import json
import math
import sys
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from local_tasks import bos_windows, continuations, write_choices, write_rolling

from ghost_dist.config_file import load_config
from ghost_dist.pipeline.recover import recover
from ghost_dist.report.terminal import print_result

LENGTH, WINDOWS = 512, 64


def main(shared: Path, out: Path) -> None:
    """Write the tasks to OUT/tasks, run to OUT/run, print both perplexities of the same bytes."""
    model, text = shared / "models" / "wiki-llama-32l", shared / "data" / "wikitext2-test.txt"
    folder = out / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = bos_windows(text, tokenizer, windows=WINDOWS, window_length=LENGTH)
    write_rolling(folder, texts.values())
    write_choices(folder, continuations(text.read_text(encoding="utf-8"), 400))
    fields = {
        "model.path": str(model),
        "model.dtype": "float32",
        "calibration.source": str(shared / "data" / "calibration.txt"),
        "calibration.sampling": "beginning",
        "calibration.windows": 64,
        "calibration.window_length": 1024,
        "calibration.window_bos": True,
        "selection.spans": [[11, 18]],
        "evaluation.corpora": {"wikitext2": str(text)},
        "evaluation.windows": WINDOWS,
        "evaluation.window_length": LENGTH,
        "evaluation.tasks": [f"{folder}/"],
        "output.path": str(out / "run"),
    }
    result = recover(load_config(None, fields))
    print_result(result, out / "run")
    stage = json.loads((out / "run" / "stages" / "evaluate.json").read_text())
    num_bytes = sum(len(text.encode()) for text in texts.values())
    print(f"{len(texts)} of {WINDOWS} windows are tokenised alike as texts of their own:")
    for variant in ("dense", "pruned", "recovered"):
        nats = stage["outputs"]["nats_per_window"]["wikitext2"][variant]
        ours = math.exp(math.fsum(nats[number] for number in texts) / num_bytes)
        theirs = result["tasks"]["local_text"][variant]["metrics"]["byte_perplexity"]["value"]
        print(f"{variant}: byte perplexity {ours:.9f} here, {theirs:.9f} in lm_eval")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
