"""What recovery is worth on real pretrained LLMs: every operator and selection, one table a model.

    python tests/benchmarks/real_models.py MODEL... --calibration natural.txt \
        --text wikitext2=wikitext2-test.txt --text ptb=ptb-test.txt --out OUT

MODEL is a checkpoint folder, or a name of ghost_dist.real_models. A quarter and a third of the
layers go. float32; 64 x 1024 calibration tokens; perplexity over the first 32 windows of 1024. The
paper's settings are its selection, its operator and its absolute ridge of 1e-6, a row where its
selection is asked for. Rows are on the disk as they are done: the same command continues a stopped
one.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import get_args

import torch
import transformers
from rich.console import Console

from ghost_dist.config import Criterion
from ghost_dist.config_file import config_from_tree, parse_set, set_field
from ghost_dist.pipeline.compare import ROWS, TRAINING_FREE, compare
from ghost_dist.progress import Reporter
from ghost_dist.real_models import REAL_MODELS, real_model

SELECTIONS = get_args(Criterion)
PAPER = "the paper's"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", type=int, default=[4, 3], help="4: a quarter goes")
    parser.add_argument("--operators", nargs="+", default=TRAINING_FREE, choices=ROWS)
    parser.add_argument("--selections", nargs="+", default=SELECTIONS, choices=SELECTIONS)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--evaluation-windows", type=int, default=32)
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(
        f"{gpu or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
        flush=True,
    )
    for model in given.models:
        folder = real_model(model) if model in REAL_MODELS else Path(model)
        out = given.out / folder.name
        results = measured(folder, out, given)
        text = table(results)
        out.with_suffix(".json").write_text(json.dumps(results, indent=1))
        out.with_suffix(".md").write_text(text)
        print(f"\n## {folder.name}\n\n{text}", flush=True)


def measured(folder: Path, out: Path, given: argparse.Namespace) -> dict[str, object]:
    """Dense perplexities and all rows of a model; a row that fails says why and stops no other."""
    num_layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    removes = [num_layers // part for part in given.parts]
    paper = {"name": "ghost", "features": "stream", "ridge": {"absolute": 1e-6}}
    found: dict[str, object] = {"dense": None, "rows": []}
    for operator, rows, selections, path, label in (
        ({**paper, "choose": "residual"}, ["ghost"], ["paper"], f"{out}-paper", PAPER),
        ({}, given.operators, given.selections, str(out), None),
    ):
        if label == PAPER and "paper" not in given.selections:
            continue
        config = configuration(folder, removes[0], operator, path, given)
        for result in as_far_as_it_goes(config, removes, rows, selections):
            found["dense"] = found["dense"] or result.get("dense")
            found["rows"] += [
                {**row, "operator": label or row["operator"]} for row in result["rows"]
            ]
    return found


def configuration(folder, remove, operator, out, given):
    tree = {
        "model": {"path": str(folder), "dtype": "float32"},
        "calibration": {
            "source": given.calibration,
            "windows": given.windows,
            "window_length": given.window_length,
        },
        "selection": {"remove": remove},
        "operator": operator,
        "engine": {"device": given.device},
        "evaluation": {
            "corpora": dict(text.split("=", 1) for text in given.text),
            "windows": given.evaluation_windows,
            "window_length": given.window_length,
        },
        "output": {"path": out},
    }
    for field, value in map(parse_set, given.set):
        set_field(tree, field, value)
    return config_from_tree(tree)


def as_far_as_it_goes(config, removes, rows, selections):
    """One comparison of everything; if that fails, one of each row."""
    reporter = Reporter(console=Console(stderr=True))
    try:
        return [compare(config, removes, rows, selections, reporter)]
    except Exception as error:
        reporter.say(f"{type(error).__name__}: {error}. Each row by itself:")
    results = []
    for selection in selections:
        for remove in removes:
            for row in rows:
                try:
                    results.append(compare(config, [remove], [row], [selection], reporter))
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
                    reporter.say(f"{remove} {selection} {row}: {reason}")
                    cut = {"selection": selection, "remove": remove, "spans": []}
                    results.append({"rows": [{**cut, "operator": row, "refused": reason}]})
    return results


def table(results) -> str:
    """Markdown; selections that found the same spans share a row."""
    dense = results["dense"] or {}
    together = {}
    for row in results["rows"]:
        spans = ", ".join(f"[{start}, {stop})" for start, stop in row["spans"])
        together.setdefault((row["remove"], spans, row["operator"]), (row, []))[1].append(
            row["selection"]
        )
    titles = ["layers", "selection", "spans", "operator", *dense, "KL", "parameters"]
    titles.append("added MFLOP / token")
    lines = [
        "Dense: " + ", ".join(f"{name} {value:.2f}" for name, value in dense.items()) + "\n",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
    ]
    reasons = []
    for (remove, spans, operator), (row, selections) in sorted(
        together.items(), key=lambda item: item[0][:2]
    ):
        cells = [str(remove), ", ".join(selections), spans, operator]
        if "refused" in row:
            cells += ["-"] * (len(titles) - len(cells))
            reasons.append(f"- {remove} layers, {operator}: {row['refused']}")
        else:
            kl = row["kl"]
            cells += [f"{row['perplexity'][name]:.2f}" for name in dense]
            cells += ["-" if kl is None else f"{kl:.3f}", f"{row['parameters']:,}"]
            cells.append(f"{row['added_flops'] / 1e6:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    if reasons:
        lines += ["", "Without figures:", *dict.fromkeys(reasons)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
