"""The reference table on the trained 32-layer model: four columns, three spans, two texts.

    python tests/benchmarks/reference_table.py SHARED

SHARED holds ``models/wiki-llama-32l`` and ``data/``. float32, 64 x 1024 calibration tokens packed
without special tokens, absolute ridge 1e-6, perplexity over the first 32 windows of 1024 tokens.
One set of statistics serves all operators. Beside each figure: the reference figure and the
relative difference.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.config_file import load_config
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.evaluation.scores import window_scores
from ghost_dist.pipeline.candidates import Candidate
from ghost_dist.pipeline.inputs import open_inputs
from ghost_dist.pipeline.solving import Solver
from ghost_dist.pipeline.stages import Stages
from ghost_dist.progress import Reporter
from ghost_dist.ridge import AbsoluteRidge
from ghost_dist.run_folder import RunFolder

COLUMNS = ("none", "fold", "ghost", "ghost-joint")
REFERENCE = {  # span: text: one figure a column
    "11:18": {
        "wikitext2": (59.14, 48.96, 43.50, 42.78),
        "ptb": (73.38, 59.77, 54.49, 53.51),
    },
    "9:20": {
        "wikitext2": (132.38, 83.08, 65.25, 62.11),
        "ptb": (176.38, 104.86, 82.77, 78.11),
    },
    "7:18": {
        "wikitext2": (123.32, 69.67, 55.62, 53.39),
        "ptb": (162.53, 84.82, 70.67, 66.80),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--spans", nargs="*", default=list(REFERENCE), choices=list(REFERENCE))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}\n"
    )
    print("| span | text | operator | reference | measured | difference |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    path = arguments.shared / "models" / "wiki-llama-32l"
    model = load_causal_lm(path, dtype=torch.float32, device=device)
    for span in arguments.spans:
        with tempfile.TemporaryDirectory() as folder:
            for text, operator, value in measure(arguments.shared, span, folder, model, device):
                reference = REFERENCE[span][text][COLUMNS.index(operator)]
                worst = max(worst, abs(value / reference - 1))
                print(
                    f"| [{span.replace(':', ', ')}) | {text} | {operator} | {reference:.2f} | "
                    f"{value:.3f} | {value / reference - 1:+.2%} |",
                    flush=True,
                )
    print(f"\nworst difference: {worst:.2%}")


def measure(shared, span, folder, model, device):
    """Yields (text, operator, perplexity)."""
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
            "selection.spans": span,
            "operator.name": "ghost-joint",
            "operator.choose": "residual",
            "evaluation.corpora": {
                "wikitext2": str(data / "wikitext2-test.txt"),
                "ptb": str(data / "ptb-test.txt"),
            },
            "evaluation.windows": 32,
            "evaluation.window_length": 1024,
            "engine.device": device.type,
            "output.path": f"{folder}/joint",
        },
    )
    solver, inputs, spans = open_solver(config)
    for operator in COLUMNS:
        candidate = Candidate(operator, ridge=AbsoluteRidge(absolute=1e-6))
        operators = {s: solver.fit(candidate, s).repair for s in spans}
        layers = LayerwiseModel(model, inputs.architecture)
        for text, windows in inputs.evaluation.items():
            [found] = window_scores(layers, [Variant(spans, operators)], windows.tokens, batch=2)
            yield text, operator, found.perplexity


def open_solver(config):
    """The stages up to the statistics, and a solver on them."""
    reporter = Reporter()
    with RunFolder(config) as run:
        inputs = replace(open_inputs(config, reporter), batch=2)
        stages = Stages(inputs, run, reporter)
        tokens = stages.tokens()
        spans = stages.select(tokens)
        store = stages.calibrate(tokens, spans)
    return Solver(inputs, spans, store, tokens, reporter), inputs, spans


if __name__ == "__main__":
    main()
