"""Does the recoverability map pick the right span, and does its residual rank as perplexity does?

    python tests/benchmarks/selection.py MODEL --calibration FILE --evaluation FILE --remove N

A pass each takes the exact statistics of every span of N layers, those of all spans of 1 to N
layers with a random projection, and the paper's score. Every span of N layers is then cut,
repaired with ``ghost`` and evaluated. Printed: per span the exact and the projected held-out
residual, score and perplexity; then what each criterion picks, and the rank correlations.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
import transformers

from ghost_dist.calibration.split import assign_ranges
from ghost_dist.calibration.windows import build_windows
from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.load import load_causal_lm, load_decoder, load_tokenizer
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.engines.resident import ResidentEngine
from ghost_dist.evaluation.scores import window_scores
from ghost_dist.solver.ghost import fit_ghost
from ghost_dist.solver.span_selection import held_out_of_start, relative_residual
from ghost_dist.spans import Span
from ghost_dist.statistics.layer_scores import ScoreCollector
from ghost_dist.statistics.pair_sums import (
    PROJECTION_COLUMNS,
    PairCollector,
    candidate_spans,
    projection,
    start_key,
)
from ghost_dist.statistics.span_sums import SpanCollector, sums_key

FOLDS = 4
STREAM = "stream"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--remove", type=int, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--evaluation-windows", type=int, default=16)
    parser.add_argument("--window-length", type=int, default=1024)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_checkpoint(arguments.model)
    architecture = inspect_architecture(source)
    tokenizer = load_tokenizer(arguments.model)
    calibration, evaluation = (
        build_windows(
            text,
            tokenizer,
            windows=count,
            window_length=arguments.window_length,
            seed=None,
            special_tokens=False,
            window_bos=False,
            vocab_size=architecture.vocab_size,
        )
        for text, count in (
            (arguments.calibration, arguments.windows),
            (arguments.evaluation, arguments.evaluation_windows),
        )
    )
    model = load_causal_lm(arguments.model, dtype=torch.float32, device=device)
    layers, width = architecture.num_layers, architecture.hidden_size
    fixed = candidate_spans(layers, arguments.remove, arguments.remove)
    pairs = candidate_spans(layers, 1, arguments.remove)
    folds = []
    decoder = load_decoder(arguments.model, architecture, layers, torch.float32, device)
    engine = ResidentEngine(decoder, 2)
    for windows in assign_ranges([w % FOLDS for w in range(calibration.num_windows)], FOLDS):
        parts = {
            "exact": SpanCollector([(span, STREAM) for span in fixed], width, device),
            "pairs": PairCollector(fixed, width, device, None),
            "map": PairCollector(pairs, width, device),
            "paper": ScoreCollector(layers, arguments.remove, device),
        }
        folds.append({})
        for name, part in parts.items():
            engine.run(calibration.tokens, windows, part, lambda _: None)
            folds[-1] |= {f"{name}/{key}": sums for key, sums in part.result().items()}
    stops = {s: [p.stop for p in pairs if p.start == s] for s in {p.start for p in pairs}}
    exact, estimate = {}, {}
    for span in fixed:
        key = f"pairs/{start_key(span.start)}"
        exact |= held_out_of_start(span.start, [span.stop], [f[key] for f in folds], None)
    project = projection(width, PROJECTION_COLUMNS).to(device)
    for start, of_start in stops.items():
        key = f"map/{start_key(start)}"
        estimate |= held_out_of_start(start, of_start, [f[key] for f in folds], project)
    total = folds[0]["paper/scores"]
    for fold in folds[1:]:
        total = total + fold["paper/scores"]
    paper = dict(zip(fixed, total.mean(), strict=True))

    print(
        f"{arguments.model.name}: remove {arguments.remove} of {layers} layers; {device.type}, "
        f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print("\n| span | residual | projected (standard error) | paper | perplexity |")
    print("|---|---|---|---|---|")
    measured: dict[Span, float] = {}
    for span in fixed:
        moments = [fold[f"exact/{sums_key(span, STREAM)}"] for fold in folds]
        repair, _ = fit_ghost(str(span), moments, "auto")
        layers, variant = LayerwiseModel(model, architecture), Variant((span,), {span: repair})
        [found] = window_scores(layers, [variant], evaluation.tokens, batch=2)
        measured[span] = found.perplexity
        error = estimate[span].standard_error / estimate[span].energy
        print(
            f"| {span} | {relative_residual(exact[span]):.5f} | "
            f"{relative_residual(estimate[span]):.5f} ({error:.5f}) | {paper[span]:.4f} | "
            f"{measured[span]:.2f} |",
            flush=True,
        )
    best = min(fixed, key=lambda s: relative_residual(exact[s]))
    picked = min(fixed, key=lambda s: relative_residual(estimate[s]))
    alike = max(fixed, key=lambda s: paper[s])
    least = min(fixed, key=lambda s: measured[s])
    excess = relative_residual(exact[picked]) / relative_residual(exact[best]) - 1
    print(f"\nleast residual: {best}, perplexity {measured[best]:.2f}")
    print(f"projected map picks {picked}; its true residual is {excess:.2%} above the least")
    print(f"the paper's score picks {alike}, perplexity {measured[alike]:.2f}")
    print(f"least perplexity of all: {least}, {measured[least]:.2f}")
    order = [measured[s] for s in fixed]
    for name, scores in (
        ("residual", [relative_residual(exact[s]) for s in fixed]),
        ("projected residual", [relative_residual(estimate[s]) for s in fixed]),
        ("1 - paper", [1 - paper[s] for s in fixed]),
    ):
        print(f"Spearman of {name} with perplexity: {spearman(scores, order):.3f}")


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation; there are no ties among real figures."""
    ranks = [torch.tensor(x, dtype=torch.float64).argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


if __name__ == "__main__":
    main()
