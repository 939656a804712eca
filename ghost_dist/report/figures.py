"""Charts of the page, each with what it says and the numbers behind it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

from ghost_dist.report import text
from ghost_dist.report.plot import Axis, Cell, Mark, Plot, Series, heat_map, line_chart
from ghost_dist.report.record import RunRecord
from ghost_dist.report.spectrum import Spectrum
from ghost_dist.report.tables import Table, candidate_spans

_STYLES = ("s0", "s1", "s2", "s3")
_LONGEST_TABLE = 40
_CRITERIA = {
    "cosine": "cosine similarity of the streams before and behind the gap",
    "angular": "angular distance of the streams before and behind the gap",
    "paper": "cosine similarity as in the published code",
    "block-influence": "1 - cosine similarity of a layer's input and output",
}


class Figure(NamedTuple):
    """A drawing with its title, what it says, and the numbers behind it."""

    title: str
    words: str
    plot: Plot
    numbers: Table


def recoverability(run: RunRecord) -> Figure:
    """What is left after repair: a curve over first layers, or a map over these and lengths."""
    rows = run.selection["recoverability"]
    listed = candidate_spans(run, _LONGEST_TABLE)
    told = "" if len(listed) == len(rows) else f" (best {_LONGEST_TABLE} of {len(rows)})"
    chosen = [number for number, row in enumerate(listed) if row["span"] in run.spans]
    numbers = Table(
        f"Candidate spans{told}",
        ["Span", "Left after repair", "Plain cut", "Cost", "Ridge / median", ""],
        [
            (
                text.span(row["span"]),
                text.percent(row["residual"], 2),
                text.percent(row["cut"], 2),
                text.number(row["cost"]),
                text.number(row["relative_ridge"], 2),
                "chosen" if number in chosen else "",
            )
            for number, row in enumerate(listed)
        ],
        marked=chosen,
    )
    lengths = {row["span"][1] - row["span"][0] for row in rows}
    taken = text.spans(run.spans)
    if len(lengths) > 1:
        drawing = heat_map(
            "Unexplained share of the stream's energy after repair, by first layer and number of "
            f"layers removed; chosen {taken}.",
            [
                Cell(
                    row["span"][0],
                    row["span"][1] - row["span"][0],
                    row["residual"],
                    f"{text.span(row['span'])}: {text.percent(row['residual'], 2)}",
                    row["span"] in run.spans,
                )
                for row in rows
            ],
            "first layer removed",
            "layers removed",
            "unexplained share:",
        )
        words = f"Stronger colour: easier to repair. Framed: chosen, {taken}."
        return Figure("Recoverability map", words, drawing, numbers)
    repaired = [(row["span"][0], row["residual"]) for row in rows]
    drawing = line_chart(
        f"Unexplained share of the stream's energy for spans of {lengths.pop()} layers by "
        f"their first layer, after repair and for the plain cut; chosen {taken}.",
        [
            Series("after repair", repaired, "recovered", dots=True),
            Series("cut", [(row["span"][0], row["cut"]) for row in rows], "pruned"),
        ],
        Axis("first layer removed", whole=True),
        Axis("unexplained share of energy", log=min(residual for _, residual in repaired) > 0),
        [
            Mark((row["span"][0], row["residual"]), text.span(row["span"]), "recovered")
            for row in rows
            if row["span"] in run.spans
        ],
    )
    words = "The lower, the better the gap can be repaired; the ring is what was chosen."
    return Figure("Recoverability by first layer", words, drawing, numbers)


def layer_scores(run: RunRecord) -> Figure:
    """Scores of another criterion, by layer or first layer."""
    criterion = run.config["selection"]["criterion"]
    meaning = _CRITERIA[criterion]
    of_layers = criterion == "block-influence"
    where = "layer" if of_layers else "first layer removed"
    points = [(float(i), s) for i, s in enumerate(run.selection["scores"]) if s is not None]
    starts = [i for span in run.spans for i in (range(*span) if of_layers else span[:1])]
    drawing = line_chart(
        f"{meaning} by {where}; chosen {text.spans(run.spans)}.",
        [Series(meaning, points, "dense", dots=True)],
        Axis(where, whole=True),
        Axis(meaning if len(meaning) < 30 else criterion),
        [Mark((x, y), f"{x:.0f}", "recovered") for x, y in points if x in starts],
    )
    numbers = Table(
        f"Scores by {where}",
        [where.capitalize(), meaning.capitalize(), ""],
        [(f"{i:.0f}", text.number(s, 4), "chosen" if i in starts else "") for i, s in points],
        marked=[number for number, (i, _) in enumerate(points) if i in starts],
    )
    wanted = "least" if criterion in ("angular", "block-influence") else "largest"
    words = f"{meaning.capitalize()}; the {wanted} is taken, marked by a ring."
    return Figure("Layer similarity", words, drawing, numbers)


def ridge_curve(run: RunRecord) -> Figure | None:
    """Held-out residual of every ridge; None where one was given."""
    series, marks, labels, said = [], [], [], []
    for fit, style in zip(run.fits, itertools.cycle(_STYLES), strict=False):
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
    numbers = Table(
        "Held-out residual of every ridge tried",
        ["Ridge / median", "Span", "Held-out residual", ""],
        [
            (
                text.number(ridge, 2),
                text.span(fit["span"]),
                text.number(residual, 4),
                "taken" if ridge == fit["relative_ridge"] else "",
            )
            for fit in run.fits
            for ridge, residual in fit["ridge_curve"]
        ],
    )
    words = f"The ring is the ridge that was taken: {text.join_words(labels)}{why}."
    return Figure("Ridge curve", words, drawing, numbers)


def channels(run: RunRecord) -> Figure | None:
    """Held-out R2 of every channel, sorted; None where it was not recorded."""
    found = [(text.span(span), sorted(values)) for span, values in run.r2_channels if values]
    if not found:
        return None
    series, rows = [], []
    for (span, values), style in zip(found, itertools.cycle(_STYLES), strict=False):
        last = max(1, len(values) - 1)
        series.append(Series(span, [(100 * i / last, v) for i, v in enumerate(values)], style))
        for share in (0, 1, 5, 25, 50, 75, 95, 99, 100):
            value = values[round(share / 100 * last)]
            rows.append((f"{share}{text.NARROW}%", span, text.number(value)))
    lowest = min(values[len(values) // 100] for _, values in found)
    drawing = line_chart(
        "Held-out R² of every channel of the stream, from the worst to the best.",
        series,
        Axis("channels, worst to best, per cent", low=0, high=100),
        Axis("held-out R²", low=min(0.0, math.floor(10 * lowest) / 10), high=1.0),
    )
    numbers = Table("Quantiles of R² over channels", ["Channels below", "Span", "R²"], rows)
    words = "At 1 a channel behind the gap is predicted exactly, at 0 no better than by its mean."
    return Figure("R² by channel", words, drawing, numbers)


def spectrum(spectra: Mapping[str, Spectrum]) -> Figure:
    """Singular values of every matrix that acts at a boundary."""
    series, rows = [], []
    for (name, of), style in zip(spectra.items(), itertools.cycle(_STYLES), strict=False):
        values = of.singular_values
        series.append(Series(name, [(i, value) for i, value in enumerate(values, 1)], style))
        rows += [(str(i + 1), name, text.number(values[i], 4)) for i in _spread(len(values), 12)]
    drawing = line_chart(
        f"Singular values by rank of {text.join_words(list(spectra))}.",
        series,
        Axis("rank"),
        Axis("singular value", log=True),
    )
    words = "A steep fall means that few directions do most of the repair."
    titles = ["Rank", "Matrix", "Singular value"]
    return Figure("Spectrum", words, drawing, Table("Singular values, some of them", titles, rows))


def distillation(run: RunRecord) -> Figure | None:
    """Held-out loss by step; None where it was never finite."""
    refined = run.stages["refine"]
    points = [(float(r["step"]), r["loss"]) for r in refined["losses"] if r["loss"] is not None]
    if not points:
        return None
    drawing = line_chart(
        f"Held-out loss by step, from {points[0][1]:.4f} to {points[-1][1]:.4f}.",
        [Series("held-out loss", points, "recovered", dots=True)],
        Axis("optimiser step", whole=True),
        Axis("held-out loss"),
    )
    rows = [(f"{step:.0f}", text.number(loss, 5)) for step, loss in points]
    numbers = Table("Held-out loss by step", ["Step", "Held-out loss"], rows)
    kept = "was kept" if refined["improved"] else "did not improve, and was not kept"
    return Figure("Distillation", f"What was trained {kept}.", drawing, numbers)


def _spread(length: int, wanted: int) -> list[int]:
    """Indices from 0 to length - 1, closer together at the beginning."""
    if length <= wanted:
        return list(range(length))
    ratio = math.log(length) / (wanted - 1)
    return sorted({min(length - 1, round(math.exp(ratio * i)) - 1) for i in range(wanted)})
