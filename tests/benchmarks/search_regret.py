"""How far is a search for layers from the best of all removals, and does its score hold elsewhere?

    python tests/benchmarks/search_regret.py MODEL --calibration FILE --corpora FILE ... --remove N

Of some layers, spread over the model, every choice of N is scored as the search scores it. Printed:
the KL divergence of the best choice, of what the search finds for each effort with the evaluations
it took, and of the best single span; then, over a part of all choices, the rank correlation between
that score and the perplexity of the same recovered models on other texts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))
from all_removals import exhaustive

from ghost_dist.calibration.split import spread
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.config_file import load_config
from ghost_dist.evaluation.scores import corpus_scores
from ghost_dist.pipeline import searching
from ghost_dist.pipeline.inputs import open_inputs
from ghost_dist.pipeline.search_effort import EFFORTS
from ghost_dist.pipeline.stages import Stages
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import RunFolder
from ghost_dist.solver.removals import Rules, single_spans
from ghost_dist.solver.search import Search
from ghost_dist.spans import Span, check_spans

QUIET = Reporter(console=Console(quiet=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--corpora", nargs="+", type=Path, default=[])
    parser.add_argument("--remove", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12, help="that may go")
    parser.add_argument("--ranked", type=int, default=40, help="choices whose perplexity is taken")
    parser.add_argument("--evaluation-windows", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measured(given, folder), indent=1))


def measured(given: argparse.Namespace, folder: str) -> dict[str, Any]:
    fields = {
        "model.path": given.model,
        "model.dtype": "float32",
        "calibration.source": given.calibration,
        "selection.remove": given.remove,
        "selection.effort": "thorough",
        "evaluation.corpora": {path.stem: str(path) for path in given.corpora},
        "evaluation.windows": given.evaluation_windows,
        "evaluation.window_length": 1024,
        "output.path": folder,
    }
    config = load_config(None, fields | dict(one.split("=", 1) for one in given.set))
    with RunFolder(config) as run:
        inputs = open_inputs(config, QUIET)
        tokens = Stages(inputs, run, QUIET).tokens()
        num_layers = inputs.architecture.num_layers
        free = spread(range(num_layers), given.layers)
        rules = Rules(num_layers, given.remove, tuple(set(range(num_layers)) - set(free)))
        windows = searching.Windows.of(inputs, tokens)
        judges = windows.judges
        with searching.scoring(inputs, windows, QUIET) as score:
            table = exhaustive(rules, score, judges.windows)
            kl_of = {removal: kl for kl, removal in table}
            spans = [kl_of[span] for span in single_spans(rules) if span in kl_of]
            found = {
                "layers": free,
                "choices": len(table),
                "best": [table[0][1], table[0][0]],
                "median": table[len(table) // 2][0],
                "best_span": min(spans, default=None),
                "search": {},
            }
            for name, effort in EFFORTS.items():
                search = Search(rules, score, judges, effort=effort.rounds, width=effort.width)
                ended = search.run()
                regret = kl_of[ended.removal] / table[0][0] - 1
                found["search"][name] = {
                    "removal": ended.removal,
                    "evaluations": ended.evaluations,
                    "of": 2 * len(table) * len(judges.windows),
                    "regret": regret,
                }
            ranked = [table[i] for i in spread(range(len(table)), given.ranked)]
            found["rank_correlation"] = correlations(inputs, score, ranked)
    return found


def correlations(inputs: Any, score: Any, ranked: list[tuple[float, tuple[int, ...]]]) -> Any:
    """Spearman's, of the score and the perplexity, by corpus."""
    removals = [
        check_spans((Span(unit, unit + 1) for unit in removal), num_layers=1 << 30)
        for _, removal in ranked
    ]
    score.sequential.fit(removals)
    variants = [Variant(), *score.sequential.variants(removals, 0)]
    found = corpus_scores(score.model, variants, inputs.evaluation, batch=inputs.batch)
    scores = {name: of_corpus[1:] for name, of_corpus in found.items()}
    kl = torch.tensor([kl for kl, _ in ranked])
    return {
        name: float(
            torch.corrcoef(
                torch.stack([x.argsort().argsort().double() for x in (kl, perplexities(of_corpus))])
            )[0, 1]
        )
        for name, of_corpus in scores.items()
    }


def perplexities(scores: Any) -> torch.Tensor:
    return torch.tensor([one.perplexity for one in scores])


if __name__ == "__main__":
    main()
