"""A run, a plan, a comparison and what else a command finds, as tables on a terminal."""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from ghost_dist.config_file import shown_tree
from ghost_dist.evaluation.task_rows import (
    VARIANTS,
    broken,
    generation,
    probe_rows,
    task_rows,
    unasked,
)
from ghost_dist.progress import duration
from ghost_dist.report import text, verdict
from ghost_dist.report.record import RunRecord

_BAR = 24  # characters
_LONGEST = 120  # characters of an event
_PARTS = " ▏▎▍▌▋▊▉█"
_STYLES = {"dense": "blue", "pruned": "red", "recovered": "green"}
console = Console()  # where everything is printed


def print_result(result: Mapping[str, Any], run: Path) -> None:
    """Print what a run gave, from the content of result.json: what counts most stands last."""
    _print_samples(result["samples"][:1])
    # Not of results before 2026-12.
    found, probes = result.get("generation", {}), result.get("probes", {})
    if found:
        _say(generation(found))
    if rows := probe_rows(probes):
        _show(Table("probe, answered right", "questions", *VARIANTS), rows)
    if missing := unasked(probes, result.get("unasked", [])):
        _say(missing)
    if result["perplexity"]:
        _print_perplexity(result)
    if result["tasks"]:
        table = Table("task", Column("metric", overflow="fold"), *VARIANTS)
        _show(table, [(name, metric, *cells) for name, metric, cells in task_rows(result["tasks"])])
    before, after = result["parameters"]["before"], result["parameters"]["after"]
    layers = [f"layers {text.spans(result['spans'])}"] if result["spans"] else []
    _say(
        f"removed {', '.join([*layers, *result['sublayers']])}; operator {result['operator']}; "
        f"parameters {before:,} -> {after:,} ({text.percent(after / before - 1, 1, sign=True)}); "
        f"{text.nbytes(result['bytes']['before'])} -> {text.nbytes(result['bytes']['after'])}"
    )
    _print_pareto(result["selection"].get("pareto", ()), result["spans"])
    if (target := result.get("target")) is not None:
        _say(f"target {text.target_words(target)}")
    for lost in broken(found, probes):
        _say(lost, style="bold red")
    _say(f"checkpoint: {run / 'checkpoint'}")
    _say(f"load it: {text.load_words(run / 'checkpoint')}")
    config = shown_tree(run / "config.yaml", {})
    remedies = verdict.remedies(config, run, result["fit"], helps=not result["no_better_than_cut"])
    if not result["no_better_than_cut"]:
        quoted = shlex.quote(str(run))
        _say(f"how it came about: {run / 'report.html'}, or ghost-dist report {quoted}")
        _say(f"how fast it is: ghost-dist bench-serving {quoted}")
        _say("to come closer to the dense model, try {}: {}".format(*remedies[0]))
        return
    # Nobody should take a model for repaired that is not: in a frame, and what to change.
    said = verdict.sentences(result["no_better_than_cut"], result["operator"])
    console.print(
        Panel(Text("\n".join(said)), title="NO BETTER THAN THE PLAIN CUT", style="bold red")
    )
    for what, command in remedies:
        _say(f"{what}:\n    {command}")


def _print_pareto(rows: Sequence[Mapping[str, Any]], chosen: Sequence[Sequence[int]]) -> None:
    """All that was searched for."""
    table = Table(*text.PARETO[:2], *(Column(name, no_wrap=True) for name in text.PARETO[2:]))
    for row in rows:
        taken = row["spans"] == chosen
        named = {**row, "wanted": f"{row['wanted']} *"} if taken else row
        cells = map(escape, text.pareto_cells(named))
        table.add_row(*cells, style="bold green" if taken else None)
    if rows:
        _show(table)
        _say("* this one; another of these: the same command with another --remove or --target-...")
        _say(
            "KL is that of the search: on calibration text, weighted by how sure the dense model is"
        )


def _print_samples(samples: Iterable[Mapping[str, Any]]) -> None:
    """How the three models continue texts."""
    for one in samples:
        table = Table(
            escape(f"{one['text']} continued"), Column(Text(_line(one["prompt"])), overflow="fold")
        )
        for variant in VARIANTS:
            table.add_row(Text(variant, style=_STYLES[variant]), Text(_line(one[variant])))
        _show(table)


def _print_perplexity(result: Mapping[str, Any]) -> None:
    table = Table("perplexity", *VARIANTS, "gap closed")
    for name, value in result["perplexity"].items():
        cost, won = value["pruned"] - value["dense"], value["pruned"] - value["recovered"]
        closed = Text(f"{won / cost:.0%}" if cost > 0 else "-", style="" if won > 0 else "red")
        table.add_row(name, *(text.perplexity(value[variant]) for variant in VARIANTS), closed)
    _show(table)
    titles = ("KL of the evaluation: pruned", "recovered", "same token: pruned", "recovered")
    rows = []
    for name, value in result["agreement"].items():
        found = [value[variant] for variant in VARIANTS[1:]]
        kl = [text.number(one["kl"]) for one in found]
        rows.append((name, *kl, *(f"{one['top1']:.1%}" for one in found)))
    _show(Table("from the dense model", *titles), rows)


def _print_tried(
    candidates: Sequence[Mapping[str, Any]], fits: Sequence[Mapping[str, Any]]
) -> None:
    """What was tried, and how far from the dense model on held-out windows; the fits taken."""
    table = Table("tried", "ridge / median", "residual of the candidates", "KL of the candidates")
    for row in candidates:
        name = text.candidate(row)
        table.add_row(
            f"[bold]{name} *" if row["chosen"] else name,
            ", ".join(text.number(r, 2) for r in row.get("relative_ridge", ())),
            ", ".join(map(text.number, row.get("residual", ()))),
            text.divergence(row),
        )
    if len(candidates) > 1:
        _show(table)
    titles = ("span", "ridge / median", "held-out residual", "R2 of all variance", "condition")
    digits = {"relative_ridge": 2, "residual": 3, "r2": 3, "condition": 2, "tokens_per_channel": 2}
    rows = [
        (escape(text.span(fit["span"])), *(text.number(fit[of], n) for of, n in digits.items()))
        for fit in fits
    ]
    if rows:
        _show(Table(*titles, "tokens / regressor"), rows)


def print_run(path: Path) -> None:
    """Print a run: what was tried, fits, what to beware of, result."""
    run = RunRecord(path)
    if (curves := _ridge_curves(run)) is not None:
        _show(curves)
    _print_tried(run.candidates, run.fits)
    for remark in verdict.remarks(run):
        _say(f"note: {remark}")
    if run.result is not None:
        if "serving" in run.result:
            print_serving(run.result["serving"])
        print_result(run.result, path)
    for said in run.out_of_date:
        _say(said)


def print_stage(path: Path, stage: str) -> None:
    """Print what a stage that was done by itself gave, and what is out of date now."""
    run = RunRecord(path)
    record = run.stages[stage]
    if stage == "select":
        _print_pareto(record.get("pareto", ()), record["spans"])
        _say(f"chosen: layers {text.spans(record['spans'])} of {record['num_layers']}")
    if stage == "calibrate":
        _say(f"sums of {record['ranges']} ranges are there")
    if stage == "solve":
        _print_tried(record["candidates"], record["fits"])
        _say(f"solved: {record['operator']}, in {path / 'operators'}")
    if stage in ("export", "evaluate") and run.result is not None:
        print_result(run.result, path)
    for said in run.out_of_date:
        _say(said)


def print_comparison(result: Mapping[str, Any], folder: Path) -> None:
    """Print the rows of a comparison and where its files lie."""
    corpora = list(result["dense"])
    console.print(
        "dense: " + ", ".join(f"{n} {text.perplexity(v)}" for n, v in result["dense"].items()),
        markup=False,
    )
    table = Table("layers", "selection", "spans", "operator", *corpora, "parameters")
    for row in result["rows"]:
        cells = ["-"] * (len(corpora) + 1)
        if "refused" not in row:
            cells = [text.perplexity(row["perplexity"][name]) for name in corpora]
            cells.append(f"{row['parameters']:,}")
        spans = escape(text.spans(row["spans"]))
        table.add_row(str(row["remove"]), row["selection"], spans, row["operator"], *cells)
    _show(table)
    for reason in dict.fromkeys(row["refused"] for row in result["rows"] if "refused" in row):
        console.print(f"not possible: {reason}", markup=False, soft_wrap=True)
    _say(f"written: {folder / 'compare.html'}, compare.md and compare.json")


def print_serving(measured: Mapping[str, Any]) -> None:
    """Print what ``bench_serving`` measured: dense, pruned and recovered side by side."""
    _say(
        f"{measured['device']}; {measured['dtype']}; {measured['batch']} x {measured['prompt']} "
        f"tokens of prompt, {measured['new']} new; {measured['rounds']} rounds"
    )
    table = Table("", *measured["variants"])
    variants = list(measured["variants"].values())
    table.add_row("layers", *(str(v["layers"]) for v in variants))
    table.add_row("parameters", *(f"{v['parameters']:,}" for v in variants))
    table.add_row("weights, GB", *(f"{v['weight_bytes'] / 1e9:.3f}" for v in variants))
    if all(v["peak_bytes"] is not None for v in variants):
        table.add_row("peak memory, GB", *(f"{v['peak_bytes'] / 1e9:.3f}" for v in variants))
    for part in ("prefill", "decode", "request"):
        rates = [v[part] for v in variants]
        table.add_row(f"{part}, tokens/s", *(f"{r['median']:,.1f}" for r in rates))
        table.add_row("  range", *(f"{r['low']:,.1f} to {r['high']:,.1f}" for r in rates))
        table.add_row("  times dense", *(f"{r['ratio']:.2f}" for r in rates))
        ranges = [r.get("ratio_range") for r in rates]  # not of records before 2026-12
        if all(ranges):
            table.add_row("  range", *(f"{low:.2f} to {high:.2f}" for low, high in ranges))
    _show(table)
    if "target" in measured:
        _say(f"target {text.target_words(measured['target'])}")


def print_jobs(jobs: Sequence[Mapping[str, Any]]) -> None:
    """Print jobs of a cluster, times in UTC."""
    table = Table("job", "status", "began", "ended", Column("RUN", overflow="fold"))
    for job in jobs:
        times = [text.date(job[when]) if job[when] else "-" for when in ("started", "ended")]
        table.add_row(job["job"], job["status"], *times, job["run"])
    _show(table)


def print_job(job: Mapping[str, Any]) -> None:
    """Print what one job of a cluster does, as ``Jobs.status`` gives it; times in UTC."""
    table = Table("job", Column(job["job"], overflow="fold"))
    began, ended = (text.date(job[when]) if job[when] else "-" for when in ("started", "ended"))
    table.add_row("status", f"{job['status']}, began {began}, ended {ended}")
    table.add_row("RUN", Text(job["run"]))
    now = job.get("progress")
    if now is not None:
        at = text.clock(now["time"])
        table.add_row(f"stage {now['part']}", f"{now['stage']}: {now['words']} (at {at})")
        if now.get("committed") is not None:
            table.add_row("committed", f"{now['committed']:,} of {now['total']:,} {now['unit']}")
        for replica in now.get("replicas", ()):
            nodes = ", ".join(dict.fromkeys(replica["nodes"]))
            where = f" on {nodes}" if nodes else ""
            table.add_row(f"replica {replica['replica']}", f"{replica['state']}{where}")
    if job.get("lost"):
        table.add_row("replicas lost", str(job["lost"]))
    for path in job.get("failures", ()):
        table.add_row("logs and stacks", Text(path))
    for event in job.get("events", ()):
        fields = {k: v for k, v in event.items() if k not in ("time", "event", "attempt")}
        told = " ".join([event["event"], *(f"{name}={value}" for name, value in fields.items())])
        told = told if len(told) <= _LONGEST else f"{told[:_LONGEST]}..."
        table.add_row(text.clock(event["time"]), Text(told))
    table.add_row("last line", Text(job["last_line"]))
    _show(table)


def print_upload(repo_id: str, files: Mapping[str, int], notes: Sequence[str]) -> None:
    """Print what would be sent to the Hub, and what to look at before."""
    table = Table(Column("file", overflow="fold"), Column("size", justify="right"), title=repo_id)
    sizes = [*files.items(), ("all", sum(files.values()))]
    _show(table, [(name, text.nbytes(nbytes)) for name, nbytes in sizes])
    for note in notes:
        _say(f"note: {note}")


def print_plan(plan: Mapping[str, Any]) -> None:
    """Print engine, stages, disk and assumptions, from the plain values of a plan."""
    _say(
        f"{plan['model']}: {plan['num_layers']} layers, removing {text.spans(plan['spans'])}"
        f"{'' if plan['spans_known'] else ' or others'}; {plan['dtype']}, batch {plan['batch']}"
    )
    _say(
        f"{plan['device']}: {text.nbytes(plan['free_device_bytes'])} free; host "
        f"{text.nbytes(plan['free_host_bytes'])}, disk {text.nbytes(plan['free_disk_bytes'])} free"
    )
    _say(f"engine {plan['engine']['kind']}: {plan['engine']['reason']}")
    table = Table("stage", "time", "most of it", "TFLOP", "read", "written", "device", "host")
    streams = any(stage["streams"] for stage in plan["stages"])
    if streams:
        table.add_column("streams in")
    for stage in plan["stages"]:
        part = max(stage["parts"], key=stage["parts"].get, default=None)
        table.add_row(
            stage["name"],
            duration(stage["seconds"]),
            f"{part} {stage['parts'][part] / stage['seconds']:.0%}" if part else "-",
            f"{stage['flops'] / 1e12:,.0f}",
            *(
                text.nbytes(stage[name]) if stage[name] else "-"
                for name in ("read_bytes", "written_bytes", "device_bytes", "host_bytes")
            ),
            *([stage["streams"] or "-"] if streams else []),
        )
    table.add_section()
    seconds, off_by = plan["seconds"], plan["off_by"]
    table.add_row("all", duration(seconds), "", f"{plan['flops'] / 1e12:,.0f}")
    _show(table)
    _say(f"likely between {duration(seconds / off_by)} and {duration(seconds * off_by)}")
    parts = ", ".join(
        f"{name} {text.nbytes(nbytes)}" for name, nbytes in plan["disk_bytes"].items()
    )
    _say(f"RUN on the disk: {text.nbytes(sum(plan['disk_bytes'].values()))} ({parts})")
    for note in plan["notes"]:
        _say(f"assumed: {note}")


def _ridge_curves(run: RunRecord) -> Table | None:
    """Held-out residual of every ridge of every span, the one taken marked."""
    curves = [fit for fit in run.fits if len(fit["ridge_curve"]) > 1]
    if not curves:
        return None
    table = Table("span", "ridge / median", "held-out residual (plain cut: 1)", "", "", box=None)
    for fit in curves:
        most = max(1.0, min(2.0, max(residual for _, residual in fit["ridge_curve"])))
        for number, (ridge, residual) in enumerate(fit["ridge_curve"]):
            taken = ridge == fit["relative_ridge"]
            table.add_row(
                escape(text.span(fit["span"])) if number == 0 else "",
                text.number(ridge, 2),
                _bar(min(1.0, residual / most)),
                text.number(residual),
                "<- taken" if taken else "",
                style="bold green" if taken else None,
            )
    return table


def _bar(share: float) -> str:
    """A bar of eighths of a character; 1 (and infinity) fills the width."""
    if math.isnan(share):
        return ""
    eighths = round(8 * _BAR * min(1.0, max(0.0, share)))
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_PARTS[rest] if rest else "")


def _show(table: Table, rows: Iterable[Iterable[str]] = ()) -> None:
    """Print a table, or each row of it below the other where its words would be cut."""
    for row in rows:
        table.add_row(*row)
    least = console.measure(table, options=console.options.update(width=1000)).minimum
    if least <= console.width or any(column.overflow == "fold" for column in table.columns):
        return console.print(table)
    titles = [column.header for column in table.columns]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        grid = Table.grid(padding=(0, 1))
        for title, cell in zip(titles, cells, strict=True):
            grid.add_row(title, cell)
        console.print(grid, "")
    return None


def _say(words: str, style: str | None = None) -> None:
    """Print text as it is, in one line however long, with spaces that can be searched for."""
    words = words.replace(text.NBSP, " ")
    console.print(words, markup=False, highlight=False, soft_wrap=True, style=style)


def _line(words: str) -> str:
    """A text in one line."""
    return words.replace("\n", "⏎").strip()
