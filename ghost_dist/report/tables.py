"""Tables of the page: figures of a run as text, in rows and columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ghost_dist.report import text
from ghost_dist.report.record import RunRecord
from ghost_dist.report.spectrum import Spectrum

Row = Mapping[str, Any]


class Table(NamedTuple):
    """Rows whose first cell is their header."""

    caption: str
    """What it shows; also the name of the region that scrolls."""
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Collection[int] = ()
    """Rows set bold; something in the row must say why, too."""


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


def candidate_spans(run: RunRecord, most: int) -> list[Row]:
    """Of the recoverability map: the best, and the chosen ones wherever they are."""
    best = sorted(run.selection["recoverability"], key=lambda row: row["cost"])
    return best[:most] + [row for row in best[most:] if row["span"] in run.spans]


def best_first(candidates: Sequence[Row]) -> list[Row]:
    """By divergence from the dense model, or residual; what failed comes last."""

    def rank(row: Row) -> tuple[bool, float]:
        if row.get("kl") is not None:
            return "failed" in row, row["kl"]
        residuals = [1.0 if r is None else r for r in row.get("residual", ())]  # 1: the plain cut
        return "failed" in row or not residuals, sum(residuals)

    return sorted(candidates, key=rank)


def candidate_name(row: Row) -> str:
    """Operator, and what it regresses on where that is not the stream alone."""
    name: str = row["operator"]
    return name if row["features"] == "stream" else f"{name}, {row['features']}"


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


def _tenths(share: float) -> str:
    return text.percent(share, 1)
