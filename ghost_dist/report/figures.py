"""Charts and bars of the page, each with what it says; and which rows its tables have."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

from ghost_dist.evaluation.task_rows import VARIANTS
from ghost_dist.report import text
from ghost_dist.report.plot import Axis, Mark, Plot, Series, line_chart
from ghost_dist.report.record import Pair, RunRecord
from ghost_dist.report.spectrum import Spectrum

_LOGARITHMIC_FROM = 20.0  # ratio of bars, from which on a linear scale one would not be seen
_STYLES = tuple(f"s{number}" for number in range(8))  # of templates/page.css


class Figure(NamedTuple):
    title: str
    words: str  # what it says
    plot: Plot


def quality(rows: Sequence[Mapping[str, Any]], corpus: str) -> Figure | None:
    """Perplexity against size, a line a method, best first; None: one number of layers."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points = lines.setdefault(f"{row['operator']}, {row['selection']}", [])
        points.append((row["parameters"] / 1e6, row["perplexity"][corpus]))
    several = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    if not several:
        return None
    best = sorted(several, key=lambda name: math.fsum(math.log(y) for _, y in several[name]))
    shown = best[: len(_STYLES)]
    words = "The lower, the better. " + (
        f"The best {len(shown)} of {len(best)} methods." if len(best) > len(shown) else ""
    )
    drawing = line_chart(
        f"Perplexity on {corpus} against the parameters that are left, by operator and selection; "
        f"best: {best[0]}.",
        [Series(n, several[n], style, dots=True) for n, style in zip(shown, _STYLES, strict=False)],
        Axis("parameters left, millions"),
        Axis(f"perplexity, {corpus}", log=True),
    )
    return Figure("Quality against size", words.strip(), drawing)


def pareto(rows: Sequence[Mapping[str, Any]], chosen: Sequence[Sequence[int]]) -> Figure:
    """Divergence of all that was searched for, against speed, or size where that is not known."""
    fast = all(row["speedup"] is not None for row in rows)
    across = "predicted speed-up" if fast else "share of the parameters removed"
    points = [(row["speedup" if fast else "removed"], row["kl"]) for row in rows]
    drawing = line_chart(
        f"KL divergence from the dense model against the {across}; chosen {text.spans(chosen)}.",
        [Series("best found", sorted(points), "recovered", dots=True)],
        Axis(across),
        Axis("KL of the search, nats / token", low=0.0),
        [
            Mark(point, row["wanted"], "recovered")
            for point, row in zip(points, rows, strict=True)
            if row["spans"] == chosen
        ],
    )
    title = f"Quality against {'speed' if fast else 'size'}"
    return Figure(
        title, "The lower and the further right, the better. The ring is exported.", drawing
    )


def layer_scores(run: RunRecord) -> Figure:
    """The paper's scores by first layer."""
    meaning = "Cosine similarity as in the published code"
    points = [(i, s) for i, s in enumerate(run.selection["scores"]) if s is not None]
    starts = [start for start, _ in run.spans]
    drawing = line_chart(
        f"{meaning} by first layer removed; chosen {text.spans(run.spans)}.",
        [Series(meaning, points, "dense", dots=True)],
        Axis("first layer removed", whole=True),
        Axis("cosine similarity"),
        [Mark((x, y), str(x), "recovered") for x, y in points if x in starts],
    )
    words = f"{meaning}; the largest is taken, marked by a ring."
    return Figure("Layer similarity", words, drawing)


def ridge_curve(run: RunRecord) -> Figure | None:
    """Held-out residual of every ridge; None where one was given."""
    series, marks, labels, said = [], [], [], []
    for fit, style in zip(run.fits, cycle(_STYLES), strict=False):
        span, ridge, residual = text.span(fit["span"]), fit["relative_ridge"], fit["residual"]
        series.append(Series(span, sorted(p for p in fit["ridge_curve"] if p[0] > 0), style, True))
        labels.append(f"{span} {text.number(ridge, 2)}")
        said.append(f"{labels[-1]}, residual {residual:.3f}")
        # Rings of several spans lie close together, their labels would cover one another.
        marks.append(Mark((ridge, residual), labels[0] if len(run.fits) == 1 else "", style))
    if all(len(one.points) < 2 for one in series):
        return None
    drawing = line_chart(
        f"Held-out residual against the ridge; taken: {'; '.join(said)}",
        series,
        Axis("ridge / median of the Gram diagonal", log=True),
        Axis("held-out residual (plain cut = 1)"),
        marks,
    )
    by_kl = len(run.candidates) > 1 and run.config["operator"]["choose"] == "kl"
    why = ", by divergence from the dense model and not by this residual" if by_kl else ""
    words = f"The ring is the ridge that was taken: {text.join_words(labels)}{why}."
    return Figure("Ridge curve", words, drawing)


def channels(run: RunRecord) -> Figure | None:
    """Held-out R2 of every channel, sorted; None where it was not recorded."""
    found = [(text.span(span), values) for span, values in run.r2_channels if values]
    if not found:
        return None
    series = []
    for (span, values), style in zip(found, cycle(_STYLES), strict=False):
        last = max(1, len(values) - 1)
        series.append(Series(span, [(100 * i / last, v) for i, v in enumerate(values)], style))
    lowest = min(values[len(values) // 100] for _, values in found)
    drawing = line_chart(
        "Held-out R² of every channel of the stream, from the worst to the best.",
        series,
        Axis("channels, worst to best, per cent", low=0, high=100),
        Axis("held-out R²", low=min(0.0, math.floor(10 * lowest) / 10), high=1.0),
    )
    words = "At 1 a channel behind the gap is predicted exactly, at 0 no better than by its mean."
    return Figure("R² by channel", words, drawing)


def spectrum(spectra: Mapping[str, Spectrum]) -> Figure:
    """Singular values of every matrix that acts at a boundary."""
    series = [
        Series(name, list(enumerate(of.singular_values, 1)), style)
        for (name, of), style in zip(spectra.items(), cycle(_STYLES), strict=False)
    ]
    described = f"Singular values by rank of {text.join_words(list(spectra))}."
    drawing = line_chart(described, series, Axis("rank"), Axis("singular value", log=True))
    words = "A steep fall means that few directions do most of the repair."
    return Figure("Spectrum", words, drawing)


def distillation(run: RunRecord) -> Figure | None:
    """Held-out loss by step; None where it was never finite."""
    refined = run.stages["refine"]
    points = [(float(r["step"]), r["loss"]) for r in refined["losses"] if r["loss"] is not None]
    if not points:
        return None
    drawing = line_chart(
        f"Held-out loss by step, from {points[0][1]:.4f} to {points[-1][1]:.4f} nats per token.",
        [Series("held-out loss", points, "recovered", dots=True)],
        Axis("optimiser step", whole=True),
        Axis("held-out KL, nats / token"),
    )
    kept = "was kept" if refined["improved"] else "did not improve, and was not kept"
    return Figure("Distillation", f"What was trained {kept}.", drawing)


def spread(length: int, wanted: int) -> list[int]:
    """Indices from 0 to length - 1, closer together at the beginning."""
    if length <= wanted:
        return list(range(length))
    ratio = math.log(length) / (wanted - 1)
    return sorted({min(length - 1, round(math.exp(ratio * i)) - 1) for i in range(wanted)})


def best_first(candidates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By divergence from the dense model, or residual; what was dropped, or failed, comes last."""

    def rank(row: Mapping[str, Any]) -> tuple[bool, bool, float]:
        found = [row["kl"]] if row.get("kl") is not None else row.get("residual", ())
        last = "failed" in row or not found
        return last, "dropped" in row, sum(1.0 if r is None else r for r in found)  # 1: plain cut

    return sorted(candidates, key=rank)


class Bar(NamedTuple):
    """A perplexity, its 95 % interval, and its class of page.css."""

    label: str
    style: str
    value: float
    interval: Pair | None


class Bars:
    """Rows over one scale."""

    def __init__(self, rows: Sequence[Bar]) -> None:
        self.rows = rows
        finite = [row.value for row in rows if math.isfinite(row.value)]
        ends = [row.interval[1] for row in rows if row.interval]
        self._least, self._most = min(finite, default=0.0), max([*finite, *ends, 0.0])
        self.logarithmic = self._least > 0 and self._most / self._least > _LOGARITHMIC_FROM

    def along(self, value: float) -> float:
        """Share of the width."""
        if not math.isfinite(value):
            return 1.0
        if self.logarithmic:
            decades = math.log(self._most / self._least)
            return (math.log(value / self._least) + 0.1 * decades) / (1.1 * decades)
        return value / self._most if self._most > 0 else 0.0


def perplexity_bars(
    run: RunRecord, corpus: str
) -> tuple[Bars, tuple[float, Pair | None] | None, list[str]]:
    """Of the models (recovered: if repaired); the share of the gap closed; what the bars are of."""
    values, intervals = run.perplexity[corpus], run.intervals.get(corpus, {})
    repaired = values["recovered"] != values["pruned"]
    shown = VARIANTS if repaired else VARIANTS[:2]
    bars = Bars([Bar(name, name, values[name], intervals.get(name)) for name in shown])
    windows = run.num_windows(corpus)
    about = [] if windows is None else [f"{windows} windows"]
    about += ["95 % intervals"] if any(intervals.values()) else []
    about += ["bars on a logarithmic scale"] if bars.logarithmic else []
    return bars, run.gap_closed(corpus) if repaired else None, about
