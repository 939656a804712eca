"""Is the ridge that held-out windows choose near the best, with few tokens per channel and many?

    python tests/benchmarks/ridge.py MODEL --calibration FILE --evaluation FILE --span 11:18

For N/C = 1.5, 4, 16, 64 calibration tokens per channel: ``ghost`` with every ridge of the grid,
with the ridge of least held-out residual (``choose: residual``), with the one of least KL
divergence (``choose: kl``, the default) and with the paper's absolute 1e-6; perplexity on a text
that no fit has seen, in windows of the same length: longer ones hold positions that no fit knows.
"""

from __future__ import annotations

import argparse
import io
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from rich.console import Console

from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.checkpoint.surgery import as_recovered
from ghost_dist.config import AbsoluteRidge, RelativeRidge, load_config
from ghost_dist.errors import SingularGramError
from ghost_dist.evaluation.perplexity import perplexity
from ghost_dist.pipeline.candidates import Candidate
from ghost_dist.pipeline.inputs import open_inputs
from ghost_dist.pipeline.solving import Solver
from ghost_dist.pipeline.stages import Stages
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import RunFolder
from ghost_dist.solver.least_squares import RIDGE_GRID

RATIOS = (1.5, 4, 16, 64)
WINDOWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
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


def row(arguments, ratio, folder, model, device, quiet):
    windows = WINDOWS if ratio < 16 else 4 * WINDOWS
    length = round(ratio * model.config.hidden_size / windows)
    config = load_config(
        None,
        {
            "model.path": str(arguments.model),
            "model.dtype": "float32",
            "calibration.source": arguments.calibration,
            "calibration.windows": windows,
            "calibration.window_length": length,
            "selection.spans": arguments.span,
            "operator.name": "ghost",
            "operator.features": "stream",
            "evaluation.corpora": {"text": arguments.evaluation},
            "evaluation.windows": arguments.evaluation_tokens // length,
            "evaluation.window_length": length,
            "engine.device": device.type,
            "output.path": str(folder),
        },
    )
    with RunFolder(config) as run:
        inputs = open_inputs(config, quiet)
        stages = Stages(inputs, run, quiet)
        tokens = stages.tokens()
        spans = stages.select(tokens)
        store = stages.calibrate(tokens, spans)

        def measure(operators):
            with as_recovered(model, inputs.architecture, spans, operators):
                windows = inputs.evaluation["text"]
                return perplexity(model, windows, batch=2, device=device).value

        def solver(**fields):
            operator = config.operator.model_copy(update=fields)
            of = replace(inputs, config=config.model_copy(update={"operator": operator}))
            return Solver(of, spans, store, tokens, quiet, model)

        def with_ridge(ridge):
            try:
                candidate = Candidate("ghost", ridge=ridge)
                return measure({s: solver().fit(candidate, s)[0] for s in spans})
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
