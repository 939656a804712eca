"""Why these layers: the recoverability map, or the scores of another criterion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ghost_dist.report import text
from ghost_dist.report.markup import Html, beside, el, figure, section, table
from ghost_dist.report.plot import Axis, Mark, Series, heat_map, line_chart
from ghost_dist.report.record import RunRecord

_LONGEST_TABLE = 40


def choice_of_layers(run: RunRecord) -> Html | None:
    """Recoverability map or layer scores, the chosen spans marked."""
    found = run.selection
    if "recoverability" in found:
        return section("choice", "Why these layers", _recoverability(run, found["recoverability"]))
    if "scores" in found:
        return section("choice", "Why these layers", _scores(run, found["scores"]))
    given = run.config["selection"]["spans"]
    if given is None:
        return None
    return section(
        "choice", "Why these layers", el("p", "They were given by name (selection.spans).")
    )


def _recoverability(run: RunRecord, rows: Sequence[Mapping[str, Any]]) -> list[Html]:
    lengths = {row["span"][1] - row["span"][0] for row in rows}
    chosen = [list(span) for span in run.spans]
    intro = el(
        "p",
        f"Of all {len(rows)} candidate spans the held-out residual after repair was computed: the "
        "share of the energy of the stream behind the gap that the best linear operator does not "
        "explain on windows it was not fitted on.",
    )
    best = sorted(rows, key=lambda row: row["cost"])
    listed = best[:_LONGEST_TABLE]
    listed += [row for row in best[_LONGEST_TABLE:] if list(row["span"]) in chosen]
    told = "" if len(listed) == len(rows) else f" (best {_LONGEST_TABLE} of {len(rows)})"
    numbers = table(
        ["Span", "Left after repair", "Plain cut", "Cost", "Ridge / median", ""],
        [
            (
                text.span(row["span"]),
                text.percent(row["residual"], 2),
                text.percent(row["cut"], 2),
                text.number(row["cost"]),
                text.number(row["relative_ridge"], 2),
                "chosen" if list(row["span"]) in chosen else "",
            )
            for row in listed
        ],
        f"Candidate spans{told}",
        marked=[i for i, row in enumerate(listed) if list(row["span"]) in chosen],
    )
    if len(lengths) == 1:
        repaired = [(row["span"][0], row["residual"]) for row in rows]
        cut = [(row["span"][0], row["cut"]) for row in rows]
        at = {tuple(row["span"]): row["residual"] for row in rows}
        marks = [
            Mark((span[0], at[span[0], span[1]]), text.span(span), "recovered")
            for span in chosen
            if (span[0], span[1]) in at
        ]
        drawing = line_chart(
            f"Unexplained share of the stream's energy for spans of {lengths.pop()} layers by "
            f"their first layer, after repair and for the plain cut; chosen {text.spans(chosen)}.",
            [
                Series("after repair", repaired, "recovered", dots=True),
                Series("cut", cut, "pruned"),
            ],
            Axis("first layer removed", whole=True),
            Axis("unexplained share of energy", log=min(r for _, r in repaired) > 0),
            marks,
        )
        title = "Recoverability by first layer"
        words = "The lower, the better the gap can be repaired; the ring is what was chosen."
    else:
        drawing = heat_map(
            f"Unexplained share of the stream's energy after repair, by first layer and number of "
            f"layers removed; chosen {text.spans(chosen)}.",
            [
                (
                    row["span"][0],
                    row["span"][1] - row["span"][0],
                    row["residual"],
                    f"{text.span(row['span'])}: {text.percent(row['residual'], 2)}",
                )
                for row in rows
            ],
            [(start, stop - start) for start, stop in chosen],
            "first layer removed",
            "layers removed",
            "unexplained share:",
        )
        title = "Recoverability map"
        words = f"Stronger colour: easier to repair. Framed: chosen, {text.spans(chosen)}."
    top = best[:6] + [row for row in best[6:] if list(row["span"]) in chosen]
    few = table(
        ["Easiest to repair", "Left after repair", "Plain cut"],
        [
            (
                text.span(row["span"]) + (" (chosen)" if list(row["span"]) in chosen else ""),
                text.percent(row["residual"], 2),
                text.percent(row["cut"], 2),
            )
            for row in top
        ],
        "Unexplained share of energy",
        marked=[i for i, row in enumerate(top) if list(row["span"]) in chosen],
    )
    return [beside(figure(title, drawing, words, numbers), intro, few)]


def _scores(run: RunRecord, scores: Sequence[float | None]) -> Html:
    criterion = run.config["selection"]["criterion"]
    meaning = {
        "cosine": "cosine similarity of the streams before and behind the gap",
        "angular": "angular distance of the streams before and behind the gap",
        "paper": "cosine similarity as in the published code",
        "block-influence": "1 - cosine similarity of a layer's input and output",
    }[criterion]
    one = criterion == "block-influence"
    where = "layer" if one else "first layer removed"
    points = [(float(i), s) for i, s in enumerate(scores) if s is not None]
    at = dict(points)
    starts = [
        layer for start, stop in run.spans for layer in (range(start, stop) if one else [start])
    ]
    marks = [Mark((start, at[start]), str(start), "recovered") for start in starts if start in at]
    numbers = table(
        [where.capitalize(), meaning.capitalize(), ""],
        [(str(int(i)), text.number(s, 4), "chosen" if i in starts else "") for i, s in points],
        f"Scores by {where}",
        marked=[n for n, (i, _) in enumerate(points) if i in starts],
    )
    drawing = line_chart(
        f"{meaning} by {where}; chosen {text.spans(run.spans)}.",
        [Series(meaning, points, "dense", dots=True)],
        Axis(where, whole=True),
        Axis(meaning if len(meaning) < 30 else criterion),
        marks,
    )
    wanted = "least" if criterion in ("angular", "block-influence") else "largest"
    return figure(
        "Layer similarity",
        drawing,
        f"{meaning.capitalize()}; the {wanted} is taken, marked by a ring.",
        numbers,
    )
