"""Several runs side by side: figures, stacks, and in which fields they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ghost_dist.evaluation.bootstrap import interval
from ghost_dist.report import text
from ghost_dist.report.checks import remarks
from ghost_dist.report.drawings import bars, stack_of
from ghost_dist.report.markup import Child, Html, el, section, table
from ghost_dist.report.record import RunRecord


def names_of(runs: Sequence[RunRecord]) -> list[str]:
    """Folder names, with as much of the path as tells them apart."""
    paths = [run.path.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({number})" for number, run in enumerate(runs, 1)]


def comparison_title(runs: Sequence[RunRecord]) -> str:
    """The best run of those that measured the same, else what is compared."""
    corpora = _common(runs)
    names = names_of(runs)
    if not corpora or not _same_windows(runs, corpora):
        return f"{len(runs)} runs compared"
    best = {
        min(zip(names, runs, strict=True), key=lambda pair: pair[1].perplexity[c]["recovered"])[0]
        for c in corpora
    }
    if len(best) > 1:
        return f"{len(runs)} runs compared; none is best on every text"
    return f"{len(runs)} runs compared; {best.pop()} has the lowest perplexity"


def comparison_sections(runs: Sequence[RunRecord]) -> list[Html | None]:
    """All sections of a comparison."""
    return [_summary(runs), _perplexities(runs), _stacks(runs), _differences(runs), _remarks(runs)]


def _summary(runs: Sequence[RunRecord]) -> Html:
    rows: list[Sequence[Child]] = []
    for name, run in zip(names_of(runs), runs, strict=True):
        result = run.result
        layers = f"{run.num_removed}" + (f" of {run.num_layers}" if run.num_layers else "")
        parameters, change = text.DASH, text.DASH
        if result is not None:
            before, after = (result["parameters"][key] for key in ("before", "after"))
            parameters, change = text.count(after), text.percent(after / before - 1, 1, sign=True)
        seconds = sum(record["seconds"] for record in run.stages.values() if record)
        residuals = ", ".join(text.number(fit["residual"]) for fit in run.fits) or text.DASH
        kl = next((row.get("kl") for row in run.candidates if row.get("chosen")), None)
        rows.append(
            (
                name,
                layers,
                text.spans(run.spans),
                run.operator or text.DASH,
                parameters,
                change,
                residuals,
                text.number(kl),
                text.duration(seconds),
            )
        )
    titles = [
        *("Run", "Layers removed", "Spans", "Operator", "Parameters", "Change"),
        *("Held-out residual", "KL, nats / token", "Time"),
    ]
    return section("summary", "The runs", table(titles, rows, "Runs", numbers=(1, 4, 5, 6, 7, 8)))


def _perplexities(runs: Sequence[RunRecord]) -> Html | None:
    corpora = _common(runs)
    if not corpora:
        return None
    names = names_of(runs)
    content: list[Html] = []
    same = _same_windows(runs, corpora)
    if not same:
        content.append(
            el(
                "p",
                "These runs were measured on other windows or other models (their dense "
                "perplexities differ), so their perplexities cannot be set against one another.",
                class_="alert",
            )
        )
    for corpus in corpora:
        rows: list[tuple[str, str, float, Any]] = []
        if same:
            pair = runs[0].intervals.get(corpus, {}).get("dense")
            rows.append(("dense", "dense", runs[0].perplexity[corpus]["dense"], pair))
        for name, run in zip(names, runs, strict=True):
            intervals, value = run.intervals.get(corpus, {}), run.perplexity[corpus]
            if not same:
                rows.append((f"{name}, dense", "dense", value["dense"], intervals.get("dense")))
            rows.append((f"{name}, pruned", "pruned", value["pruned"], intervals.get("pruned")))
            rows.append(
                (f"{name}, recovered", "recovered", value["recovered"], intervals.get("recovered"))
            )
        drawn, logarithmic = bars(f"{corpus}: perplexity", rows, "Model", "Perplexity")
        scale = el("p", "Bars on a logarithmic scale.", class_="note") if logarithmic else None
        paired = _paired(runs, names, corpus) if same else None
        content.append(el("section", el("h3", corpus), drawn, scale, paired, class_="corpus"))
    return section(
        "perplexity",
        "Perplexity",
        content[: -len(corpora)],
        el("div", content[-len(corpora) :], class_="corpora"),
    )


def _paired(runs: Sequence[RunRecord], names: Sequence[str], corpus: str) -> Html | None:
    """Ratio of recovered perplexities to the best run's, windows drawn alike."""
    drawn = [run.resampled.get(corpus) for run in runs]
    values = [run.perplexity[corpus]["recovered"] for run in runs]
    best = int(np.argmin(values))
    reference = drawn[best]
    rows = []
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        if number == best:
            continue
        mine = drawn[number]
        pair = None
        if reference is not None and mine is not None:
            pair = interval(mine["recovered"] / reference["recovered"])
        between = text.DASH if pair is None else f"{pair[0]:.3f} {text.DASH} {pair[1]:.3f}"
        rows.append((name, f"{value / values[best]:.3f}", between))
    return table(
        ["Run", f"Times that of {names[best]}", "95 % interval"],
        rows,
        f"{corpus}: recovered perplexity, the same windows drawn for all",
    )


def _stacks(runs: Sequence[RunRecord]) -> Html | None:
    shown = []
    for name, run in zip(names_of(runs), runs, strict=True):
        drawing = stack_of(run)
        if drawing is not None:
            shown.append(el("section", el("h3", name), drawing))
    return section("removed", "What was removed", shown) if shown else None


def _differences(runs: Sequence[RunRecord]) -> Html:
    fields: dict[str, list[str]] = {}
    for number, run in enumerate(runs):
        for field, value in _flat(run.config):
            fields.setdefault(field, [text.DASH] * len(runs))[number] = str(value)
    rows = [
        (field, *values)
        for field, values in fields.items()
        if len(set(values)) > 1 and field != "output.path"
    ]
    if not rows:
        return section("configuration", "Configuration", el("p", "All runs are configured alike."))
    titles = ["Field", *names_of(runs)]
    return section(
        "configuration",
        "Where they are configured differently",
        table(titles, rows, "Fields that differ", numbers=()),
    )


def _remarks(runs: Sequence[RunRecord]) -> Html | None:
    said = [
        el("li", el("b", name), " ", remark)
        for name, run in zip(names_of(runs), runs, strict=True)
        for remark in remarks(run)
    ]
    if not said:
        return None
    return section("remarks", "Before you trust this", el("ul", said, class_="remarks"))


def _common(runs: Sequence[RunRecord]) -> list[str]:
    """Corpora that every run was measured on."""
    return [name for name in runs[0].perplexity if all(name in run.perplexity for run in runs)]


def _same_windows(runs: Sequence[RunRecord], corpora: Sequence[str]) -> bool:
    """Whether the dense model has the same perplexity everywhere: same model, same windows."""
    return all(
        abs(run.perplexity[c]["dense"] / runs[0].perplexity[c]["dense"] - 1) < 1e-3
        and run.num_windows(c) == runs[0].num_windows(c)
        for run in runs
        for c in corpora
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and not prefix:
            found += _flat(value, f"{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
