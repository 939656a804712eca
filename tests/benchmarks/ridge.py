"""Is the ridge that held-out windows choose near the best, with few tokens per channel and many?

    python tests/benchmarks/ridge.py MODEL --text FILE --span 11:18

For N/C = 1.5, 4, 16, 64 calibration tokens per channel: ``ghost`` with every ridge of the grid,
with the ridge of least held-out residual (``choose: residual``), with the one of least KL
divergence (``choose: kl``, the default) and with the paper's absolute 1e-6. The text is cut into
windows; calibration takes windows spread evenly over it, and perplexity is of others, half way
between them: so few tokens are still tokens of the whole text and not of its first page, and no
fit has seen what it is judged by.
"""

from __future__ import annotations

import argparse
import io
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console

from ghost_dist.calibration.windows import TokenWindows, build_windows
from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.config_file import load_config
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.errors import SingularGramError
from ghost_dist.evaluation.scores import window_scores
from ghost_dist.pipeline.candidates import Candidate
from ghost_dist.pipeline.inputs import open_inputs
from ghost_dist.pipeline.solving import Solver
from ghost_dist.pipeline.stages import Stages
from ghost_dist.progress import Reporter
from ghost_dist.ridge import AbsoluteRidge, RelativeRidge
from ghost_dist.run_folder import RunFolder
from ghost_dist.solver.least_squares import RIDGE_GRID

RATIOS = (1.5, 4, 16, 64)
WINDOWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--span", required=True)
    parser.add_argument("--evaluation-tokens", type=int, default=8192)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{arguments.model.name}, span {arguments.span}; {device.type}, {platform.machine()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    titles = ["N/C", *(f"{r:g}" for r in RIDGE_GRID)]
    titles += ["residual", "kl", "absolute 1e-6", "kl above best"]
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    model = load_causal_lm(arguments.model, dtype=torch.float32, device=device)
    quiet = Reporter(console=Console(file=io.StringIO()))
    for ratio in RATIOS:
        with tempfile.TemporaryDirectory() as folder:
            print(row(arguments, ratio, Path(folder), model, device, quiet), flush=True)


def split(text, tokenizer, vocab_size, windows, length, evaluation_tokens):
    """Calibration windows and evaluation windows, both spread over the text and disjoint."""
    everything = build_windows(
        text,
        tokenizer,
        windows=None,
        window_length=length,
        vocab_size=vocab_size,
    )
    fitted = np.linspace(0, everything.num_windows - 1, windows).astype(int)
    others = np.setdiff1d(np.arange(everything.num_windows), fitted)
    judged = others[np.linspace(0, len(others) - 1, evaluation_tokens // length).astype(int)]
    return [TokenWindows(everything.tokens[rows].copy(), text) for rows in (fitted, judged)]


def row(arguments, ratio, folder, model, device, quiet):
    windows = WINDOWS if ratio < 16 else 4 * WINDOWS
    length = round(ratio * model.config.hidden_size / windows)
    config = load_config(
        None,
        {
            "model.path": str(arguments.model),
            "model.dtype": "float32",
            "calibration.source": arguments.text,
            "calibration.sampling": "beginning",
            "calibration.windows": windows,
            "calibration.window_length": length,
            "selection.spans": arguments.span,
            "operator.name": "ghost",
            "operator.features": "stream",
            "engine.device": device.type,
            "output.path": str(folder),
        },
    )
    with RunFolder(config) as run:
        inputs = open_inputs(config, quiet)
        stages = Stages(inputs, run, quiet)
        tokens, judged = split(
            arguments.text,
            inputs.tokenizer,
            inputs.architecture.vocab_size,
            windows,
            length,
            arguments.evaluation_tokens,
        )
        spans = stages.select(tokens)
        store = stages.calibrate(tokens, spans)

        def measure(operators):
            layers = LayerwiseModel(model, inputs.architecture)
            [found] = window_scores(layers, [Variant(spans, operators)], judged.tokens, batch=2)
            return found.perplexity

        def solver(**fields):
            operator = config.operator.model_copy(update=fields)
            of = replace(inputs, config=config.model_copy(update={"operator": operator}))
            return Solver(of, spans, store, tokens, quiet)

        def with_ridge(ridge):
            try:
                candidate = Candidate("ghost", ridge=ridge)
                return measure({s: solver().fit(candidate, s).repair for s in spans})
            except SingularGramError:
                return float("nan")

        grid = [with_ridge(RelativeRidge(relative=r)) for r in RIDGE_GRID]
        residual = measure(solver(choose="residual").solve().operators)
        kl = measure(solver(choose="kl").solve().operators)
        best = min(value for value in grid if value == value)
        paper = with_ridge(AbsoluteRidge(absolute=1e-6))
        cells = [f"{ratio:g}", *(f"{v:.2f}" for v in (*grid, residual, kl, paper))]
        return "| " + " | ".join([*cells, f"{kl / best - 1:+.2%}"]) + " |"


if __name__ == "__main__":
    main()
