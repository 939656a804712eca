"""A finished run as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from ghost_dist.config_file import config_tree, load_config
from ghost_dist.evaluation.task_rows import task_rows
from ghost_dist.report import charts, text, verdict
from ghost_dist.report.checks import remarks
from ghost_dist.report.record import read_run


def print_result(result: Mapping[str, Any], run: Path, console: Console | None = None) -> None:
    """Print perplexities, fits and where the checkpoint lies, from the content of result.json."""
    console = console or Console()
    spans = ", ".join(f"[{start}, {stop})" for start, stop in result["spans"])
    before, after = result["parameters"]["before"], result["parameters"]["after"]
    console.print(
        f"removed layers {spans}; operator {result['operator']}; "
        f"parameters {before:,} -> {after:,} ({after / before - 1:+.1%})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if result["perplexity"]:
        table = Table("perplexity", "dense", "pruned", "recovered", "gap closed")
        for name, value in result["perplexity"].items():
            table.add_row(
                name,
                *(f"{value[variant]:.2f}" for variant in ("dense", "pruned", "recovered")),
                _gap_closed(value),
            )
        console.print(table)
        table = Table(
            "from the dense model",
            "KL, nats: pruned",
            "recovered",
            "same token: pruned",
            "recovered",
        )
        for name, value in result["agreement"].items():
            found = [value[variant] for variant in ("pruned", "recovered")]
            kl = [f"{one['kl']:.3f}" for one in found]
            table.add_row(name, *kl, *(f"{one['top1']:.1%}" for one in found))
        console.print(table)
    if result["tasks"]:
        table = Table("task", Column("metric", overflow="fold"), "dense", "pruned", "recovered")
        for name, metric, cells in task_rows(result["tasks"]):
            table.add_row(name, metric, *cells)
        console.print(table)
    if len(result["candidates"]) > 1:
        console.print(_candidates(result["candidates"]))
    if result["fit"]:
        table = Table(
            "span", "ridge / median", "held-out residual", "R2", "condition", "tokens / regressor"
        )
        for fit in result["fit"]:
            table.add_row(
                f"[{fit['span'][0]}, {fit['span'][1]})".replace("[", r"\["),
                f"{fit['relative_ridge']:.1e}",
                f"{fit['residual']:.3f}",
                f"{fit['r2']:.3f}",
                f"{fit['condition']:.1e}",
                f"{fit['tokens_per_channel']:.0f}",
            )
        console.print(table)
    console.print(
        f"checkpoint: {run / 'checkpoint'}", markup=False, highlight=False, soft_wrap=True
    )
    if result["no_better_than_cut"]:
        _print_verdict(result, run, console)


def _print_verdict(result: Mapping[str, Any], run: Path, console: Console) -> None:
    """Nobody should take a model for repaired that is not: in a frame, and what to change."""
    said = verdict.sentences(result["no_better_than_cut"], result["operator"])
    console.print(
        Panel(Text("\n".join(said)), title="NO BETTER THAN THE PLAIN CUT", style="bold red")
    )
    config = config_tree(load_config(run / "config.yaml", {}))
    for what, command in verdict.remedies(config, run):
        console.print(f"{what}:\n    {command}", markup=False, highlight=False, soft_wrap=True)


def print_run(path: Path, console: Console | None = None) -> None:
    """Print a run with charts: perplexities, recoverability, ridge curves, what to beware of.

    Raises
    ------
    RunFolderError
        If it is no RUN folder.
    """
    console = console or Console()
    run = read_run(path)
    if run.result is not None:
        print_result(run.result, path, console)
    for chart in (
        charts.perplexity_bars(run),
        charts.recoverability(run),
        charts.ridge_curves(run),
    ):
        if chart is not None:
            console.print(chart)
    for remark in remarks(run):
        console.print(f"note: {remark}", markup=False, highlight=False, soft_wrap=True)


def print_comparison(
    result: Mapping[str, Any], folder: Path, console: Console | None = None
) -> None:
    """Print the rows of a comparison and where its files lie."""
    console = console or Console()
    corpora = list(result["dense"])
    console.print(
        "dense: " + ", ".join(f"{n} {v:.2f}" for n, v in result["dense"].items()), markup=False
    )
    table = Table("layers", "selection", "spans", "operator", *corpora, "parameters")
    for row in result["rows"]:
        spans = ", ".join(f"[{start}, {stop})" for start, stop in row["spans"])
        cells = [str(row["remove"]), row["selection"], spans.replace("[", r"\["), row["operator"]]
        if "refused" in row:
            cells += ["-"] * (len(corpora) + 1)
        else:
            cells += [f"{row['perplexity'][name]:.2f}" for name in corpora]
            cells.append(f"{row['parameters']:,}")
        table.add_row(*cells)
    console.print(table)
    for reason in dict.fromkeys(row["refused"] for row in result["rows"] if "refused" in row):
        console.print(f"not possible: {reason}", markup=False, soft_wrap=True)
    console.print(
        f"written: {folder / 'compare.md'}, {folder / 'compare.json'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def print_serving(measured: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what ``bench_serving`` measured: dense, pruned and recovered side by side."""
    console = console or Console()
    console.print(
        f"{measured['device']}; {measured['dtype']}; {measured['batch']} x {measured['prompt']} "
        f"tokens of prompt, {measured['new']} new; {measured['rounds']} rounds",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    table = Table("", *measured["variants"])
    variants = list(measured["variants"].values())
    table.add_row("layers", *(str(v["layers"]) for v in variants))
    table.add_row("parameters", *(f"{v['parameters']:,}" for v in variants))
    table.add_row("weights, GB", *(f"{v['weight_bytes'] / 1e9:.3f}" for v in variants))
    if all(v["peak_bytes"] is not None for v in variants):
        table.add_row("peak memory, GB", *(f"{v['peak_bytes'] / 1e9:.3f}" for v in variants))
    for part in ("prefill", "decode"):
        rates = [v[part] for v in variants]
        table.add_row(f"{part}, tokens/s", *(f"{r['median']:,.1f}" for r in rates))
        table.add_row("  range", *(f"{r['low']:,.1f} to {r['high']:,.1f}" for r in rates))
        table.add_row("  times dense", *(f"{r['ratio']:.2f}" for r in rates))
    console.print(table)


def print_upload(
    repo_id: str, files: Mapping[str, int], notes: Sequence[str], console: Console | None = None
) -> None:
    """Print what would be sent to the Hub, and what to look at before."""
    console = console or Console()
    table = Table(Column("file", overflow="fold"), Column("size", justify="right"), title=repo_id)
    for name, nbytes in files.items():
        table.add_row(name, text.nbytes(nbytes))
    table.add_row("all", text.nbytes(sum(files.values())))
    console.print(table)
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _candidates(candidates: Sequence[Mapping[str, Any]]) -> Table:
    """What was tried, and how far each is from the dense model on held-out windows."""
    table = Table("tried", "row weights", "ridge / median", "held-out residual", "KL, nats")
    for row in candidates:
        name = row["operator"] + ("" if row["features"] == "stream" else f", {row['features']}")
        table.add_row(
            f"[bold]{name} *" if row["chosen"] else name,
            row["row_weights"],
            ", ".join("-" if r is None else f"{r:.1e}" for r in row.get("relative_ridge", ())),
            ", ".join("-" if r is None else f"{r:.3f}" for r in row.get("residual", ())),
            f"{row['kl']:.4f}" if row.get("kl") is not None else "-",
        )
    return table


def _gap_closed(value: Mapping[str, float]) -> str:
    """Share of the perplexity that pruning cost which recovery gives back."""
    cost = value["pruned"] - value["dense"]
    if cost <= 0:
        return "-"
    return f"{(value['pruned'] - value['recovered']) / cost:.0%}"
