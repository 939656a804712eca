"""Tables of the page: figures of a run as text, in rows and columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ghost_dist.evaluation.task_rows import task_rows
from ghost_dist.report import text
from ghost_dist.report.record import RunRecord
from ghost_dist.report.spectrum import Spectrum

Row = Mapping[str, Any]


class ThinBar(NamedTuple):
    """A cell that is a bar: its share of the largest, and its class of page.css."""

    share: float
    style: str


class Table(NamedTuple):
    """Rows whose first cell is their header."""

    caption: str
    """What it shows; also the name of the region that scrolls."""
    titles: Sequence[str]
    rows: Sequence[Sequence[str | ThinBar]]
    numbers: Collection[int] = range(1, 99)
    """Columns set right, in figures of one width."""
    marked: Collection[int] = ()
    """Rows set bold; something in the row must say why, too."""


def parameters(run: RunRecord) -> tuple[str, str, str] | None:
    """Before, after and the change; None while the run is not finished."""
    if run.result is None:
        return None
    before, after = (run.result["parameters"][key] for key in ("before", "after"))
    change = text.percent(after / before - 1, 1, sign=True)
    return text.count(before), text.count(after), change


def agreement(run: RunRecord) -> Table:
    """KL divergence and top-1 agreement of both cut models with the dense one."""
    intervals = run.agreement_intervals
    rows = []
    for corpus, of_corpus in run.agreement.items():
        for variant, figures in of_corpus.items():
            cells = [f"{corpus}, {variant}"]
            for name, shown in (("kl", text.number), ("top1", _tenths)):
                cells.append(shown(figures[name]))
                if intervals:
                    pair = intervals[corpus][variant][name]
                    cells.append("" if pair is None else f" {text.DASH} ".join(map(shown, pair)))
            rows.append(cells)
    between = ["95 % interval"] if intervals else []
    titles = ["Text, model", "KL", *between, "Same token", *between]
    return Table("Agreement with the dense model", titles, rows)


def tasks(run: RunRecord) -> Table:
    """Metrics of lm-evaluation-harness for the three models."""
    rows = [(name, metric, *cells) for name, metric, cells in task_rows(run.tasks)]
    titles = ["Task", "Metric", "Dense", "Pruned", "Recovered"]
    return Table("Results of tasks", titles, rows, numbers=(2, 3, 4))


def candidate_spans(run: RunRecord, most: int) -> tuple[list[Row], list[int], int]:
    """The best of the recoverability map and the chosen ones, which of them are chosen, of all."""
    best = sorted(run.selection["recoverability"], key=lambda row: row["cost"])
    rows = best[:most] + [row for row in best[most:] if row["span"] in run.spans]
    return rows, [i for i, row in enumerate(rows) if row["span"] in run.spans], len(best)


def easiest_spans(run: RunRecord) -> Table:
    """The few spans that can be repaired best."""
    rows, chosen, _ = candidate_spans(run, 6)
    return Table(
        "Unexplained share of energy",
        ["Easiest to repair", "Left after repair", "Plain cut"],
        [
            (
                text.span(row["span"]) + (" (chosen)" if number in chosen else ""),
                text.percent(row["residual"], 2),
                text.percent(row["cut"], 2),
            )
            for number, row in enumerate(rows)
        ],
        marked=chosen,
    )


def fits(run: RunRecord) -> Table:
    """The least squares of each span."""
    return Table(
        "The least squares of each span",
        ["Span", "Ridge / median", "Held-out residual", "R²", "Condition", "Tokens / regressor"],
        [
            (
                text.span(fit["span"]),
                text.number(fit["relative_ridge"], 2),
                text.number(fit["residual"]),
                text.number(fit["r2"]),
                text.number(fit["condition"], 2),
                text.number(fit["tokens_per_channel"], 3),
            )
            for fit in run.fits
        ],
    )


def candidates(run: RunRecord) -> Table:
    """What was tried and how far each is from the dense model, best first."""
    rows = sorted(run.candidates, key=_rank)
    most = max((row["kl"] for row in rows if row.get("kl") is not None), default=0.0) or 1.0

    def cells(row: Row) -> Sequence[str | ThinBar]:
        kl = row.get("kl")
        return (
            candidate_name(row) + (" (chosen)" if row["chosen"] else ""),
            "" if kl is None else ThinBar(kl / most, "recovered" if row["chosen"] else "dense"),
            "failed" if "failed" in row else text.number(kl, 4),
            row["row_weights"],
            ", ".join(text.number(r, 2) for r in row.get("relative_ridge", ())) or text.DASH,
            ", ".join(text.number(r) for r in row.get("residual", ())) or text.DASH,
        )

    return Table(
        f"{len(rows)} candidates, best first",
        ["Candidate", "KL", "nats / token", "Row weights", "Ridge / median", "Held-out residual"],
        [cells(row) for row in rows],
        numbers=(2, 4, 5),
        marked=[number for number, row in enumerate(rows) if row["chosen"]],
    )


def candidate_name(row: Row) -> str:
    """Operator, and what it regresses on where that is not the stream alone."""
    name: str = row["operator"]
    return name if row["features"] == "stream" else f"{name}, {row['features']}"


def _rank(row: Row) -> tuple[bool, float]:
    if row.get("kl") is not None:
        return "failed" in row, row["kl"]
    residuals = [1.0 if r is None else r for r in row.get("residual", ())]  # 1: the plain cut
    return "failed" in row or not residuals, sum(residuals)


def operators(spectra: Mapping[str, Spectrum]) -> Table:
    """What the spectra say in a number each; a column for each matrix."""
    columns = [
        (
            text.number(next(iter(of.singular_values), 0.0)),
            text.number(of.relative_norm),
            f"{of.effective_rank} of {len(of.singular_values)}",
            _tenths(of.antisymmetric_share),
        )
        for of in spectra.values()
    ]
    measures = (
        "Largest singular value",
        "Norm / norm of I",
        "Rank for 90 % of the squares",
        "Antisymmetric share",
    )
    return Table("Operators", ["", *spectra], list(zip(measures, *columns, strict=True)))


def healing(run: RunRecord) -> Table:
    """Layers refitted behind the gap."""
    return Table(
        "Healed layers: their down_proj refitted towards the dense stream",
        ["Layer", "Held-out residual", "Ridge / median", ""],
        [
            (
                str(row["layer"]),
                text.number(row["residual"]),
                text.number(row["relative_ridge"], 2),
                "refitted" if row["kept"] else "left as it was",
            )
            for row in run.healing
        ],
    )


def _tenths(share: float) -> str:
    return text.percent(share, 1)
