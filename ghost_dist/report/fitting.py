"""What was fitted and what it does: ridge curves, candidates, spectrum, R2 of the channels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ghost_dist.report import text
from ghost_dist.report.markup import Child, Html, beside, el, figure, section, table
from ghost_dist.report.plot import Axis, Mark, Series, line_chart
from ghost_dist.report.record import RunRecord
from ghost_dist.report.spectrum import Spectrum

_STYLES = ("s0", "s1", "s2", "s3")


def fits(run: RunRecord) -> Html | None:
    """Ridge curves and a row per span."""
    if not run.fits:
        return None
    series, marks = [], []
    for fit, style in zip(run.fits, itertools.cycle(_STYLES), strict=False):
        curve = sorted((r, e) for r, e in fit["ridge_curve"] if r > 0)
        series.append(Series(text.span(fit["span"]), curve, style, dots=True))
        taken = (fit["relative_ridge"], fit["residual"])
        marks.append(Mark(taken, f"{text.span(fit['span'])} {text.number(taken[0], 2)}", style))
    summary = table(
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
        "The least squares of each span",
    )
    drawing = None
    if any(len(one.points) > 1 for one in series):
        numbers = table(
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
            "Held-out residual of every ridge tried",
        )
        chart = line_chart(
            "Held-out residual against the ridge; taken: "
            + "; ".join(f"{mark.label}, residual {mark.point[1]:.3f}" for mark in marks),
            series,
            Axis("ridge / median of the Gram diagonal", log=True),
            Axis("held-out residual (plain cut = 1)"),
            # Rings of several spans lie close together, their labels would cover one another.
            marks if len(marks) == 1 else [replace(mark, label="") for mark in marks],
        )
        by_kl = len(run.candidates) > 1 and run.config["operator"]["choose"] == "kl"
        taken_ones = text.join_words([mark.label for mark in marks])
        words = f"The ring is the ridge that was taken: {taken_ones}" + (
            ", by divergence from the dense model and not by this residual." if by_kl else "."
        )
        drawing = figure("Ridge curve", chart, words, numbers)
    else:
        drawing = el("p", "One ridge was given, so there is no curve.", class_="note")
    note = el(
        "p",
        "Held-out residual: squared error on windows that were not fitted, over that of the plain "
        "cut: 1 repairs nothing, 0 everything. R² by position in the window is not shown: the run "
        "keeps sums over all tokens, and those do not remember where in a window a token was.",
        class_="note",
    )
    figures = el("div", drawing, _channels(run), class_="beside")
    return section("fit", "How well the gap is bridged", summary, note, figures)


def candidates(run: RunRecord) -> Html | None:
    """What was tried and how far each is from the dense model."""
    rows = run.candidates
    if len(rows) < 2:
        return None
    by_kl = any(row.get("kl") is not None for row in rows)
    order = sorted(range(len(rows)), key=lambda i: _rank(rows[i]))
    most = max((r["kl"] for r in rows if r.get("kl") is not None), default=0.0) or 1.0

    def cells(row: Mapping[str, Any]) -> Sequence[Child]:
        kl = row.get("kl")
        name = row["operator"] + ("" if row["features"] == "stream" else f", {row['features']}")
        drawn = None
        if kl is not None:
            style = "recovered" if row["chosen"] else "dense"
            filled = el("i", class_=f"bar {style}", style=f"width:{100 * kl / most:.1f}%")
            drawn = el("div", filled, class_="track thin")
        return (
            name + (" (chosen)" if row["chosen"] else ""),
            drawn,
            "failed" if "failed" in row else text.number(kl, 4),
            row["row_weights"],
            ", ".join(text.number(r, 2) for r in row.get("relative_ridge", ())) or text.DASH,
            ", ".join(text.number(r) for r in row.get("residual", ())) or text.DASH,
        )

    said = (
        "Each was fitted without some of the calibration windows and put into the model; KL is its "
        "divergence from the dense model on those windows, in nats per token. The least wins."
        if by_kl
        else "The least held-out residual wins; no model was run."
    )
    failed = [row["failed"] for row in rows if "failed" in row]
    numbers = table(
        ["Candidate", "KL", "nats / token", "Row weights", "Ridge / median", "Held-out residual"],
        [cells(rows[i]) for i in order],
        f"{len(rows)} candidates, best first",
        numbers=(2, 4, 5),
        marked=[n for n, i in enumerate(order) if rows[i]["chosen"]],
    )
    notes = [el("p", reason, class_="note") for reason in dict.fromkeys(failed)]
    return section("candidates", "What was tried", el("p", said), numbers, notes)


def _rank(row: Mapping[str, Any]) -> tuple[bool, float]:
    if row.get("kl") is not None:
        return "failed" in row, row["kl"]
    return "failed" in row or not row.get("residual"), sum(
        1.0 if r is None else r
        for r in row.get("residual", ())  # 1: the plain cut
    )


def operator(run: RunRecord, spectra: Mapping[str, Mapping[str, Spectrum]]) -> Html | None:
    """Spectrum of M and what it says."""
    if not spectra:
        if run.operator is None:
            return None
        said = (
            "Nothing acts at the gap: the layers are cut and that is all."
            if run.operator == "none"
            else "Nothing acts at the gap: the repair is in the down_proj before it, so there is "
            "no operator whose spectrum could be shown."
        )
        return section("operator", "What the operator does", el("p", said))
    series, numbers = [], []
    names: list[str] = []
    facts: list[tuple[str, ...]] = []
    styles = itertools.cycle(_STYLES)
    for span, matrices in spectra.items():
        for matrix, spectrum in matrices.items():
            values = spectrum.singular_values
            label = f"{span} {matrix}".replace(", ", ",\N{NO-BREAK SPACE}")
            points = [(float(i + 1), value) for i, value in enumerate(values)]
            series.append(Series(label, points, next(styles)))
            names.append(label)
            facts.append(
                (
                    text.number(values[0] if values else 0.0),
                    text.number(spectrum.relative_norm),
                    f"{spectrum.effective_rank} of {len(values)}",
                    text.percent(spectrum.antisymmetric_share, 1),
                )
            )
            ranks = _spread(len(values), 12)
            numbers += [(str(i + 1), label, text.number(values[i], 4)) for i in ranks]
    measures = (
        "Largest singular value",
        "Norm / norm of I",
        "Rank for 90 % of the squares",
        "Antisymmetric share",
    )
    summary = table(
        ["", *names],
        [(measure, *[fact[i] for fact in facts]) for i, measure in enumerate(measures)],
        "Operators",
    )
    note = el(
        "p",
        "The stream x becomes x W = x + x M, and + rmsnorm(x) N where there is an N. The "
        "antisymmetric share is that of the squared norm: 0 % would only stretch, 100 % only "
        "rotate, a matrix without symmetry has about 50 %.",
        class_="note",
    )
    chart = line_chart(
        f"Singular values by rank of {text.join_words([one.name for one in series])}.",
        series,
        Axis("rank"),
        Axis("singular value", log=True),
    )
    detail = table(["Rank", "Matrix", "Singular value"], numbers, "Singular values, some of them")
    drawing = figure(
        "Spectrum",
        chart,
        "A steep fall means that few directions do most of the repair.",
        detail,
    )
    return section("operator", "What the operator does", beside(drawing, summary, note))


def _channels(run: RunRecord) -> Html | None:
    """Held-out R2 of every channel, sorted."""
    found = [(span, sorted(values)) for span, values in run.r2_channels if values]
    if not found:
        return None
    series, numbers = [], []
    for (span, values), style in zip(found, itertools.cycle(_STYLES), strict=False):
        last = max(1, len(values) - 1)
        points = [(100 * i / last, value) for i, value in enumerate(values)]
        series.append(Series(text.span(span), points, style))
        numbers += [
            (
                f"{share}{text.NARROW}%",
                text.span(span),
                text.number(values[round(share / 100 * last)]),
            )
            for share in (0, 1, 5, 25, 50, 75, 95, 99, 100)
        ]
    lowest = min(values[len(values) // 100] for _, values in found)
    chart = line_chart(
        "Held-out R² of every channel of the stream, from the worst to the best.",
        series,
        Axis("channels, worst to best, per cent", low=0, high=100),
        Axis("held-out R²", low=min(0.0, math.floor(10 * lowest) / 10), high=1.0),
    )
    words = "At 1 a channel behind the gap is predicted exactly, at 0 no better than by its mean."
    detail = table(["Channels below", "Span", "R²"], numbers, "Quantiles of R² over channels")
    return figure("R² by channel", chart, words, detail)


def after_the_fit(run: RunRecord) -> Html | None:
    """Healing and refinement, where there were any."""
    content: list[Html] = []
    if run.healing:
        content.append(
            table(
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
                "Healed layers: their down_proj refitted towards the dense stream",
            )
        )
    if losses := run.stages["refine"].get("losses"):
        content.append(_distillation(losses, improved=run.stages["refine"]["improved"]))
    return section("after", "After the closed form", content) if content else None


def _distillation(losses: Sequence[Mapping[str, Any]], *, improved: bool) -> Html:
    """Held-out losses; null where one is not finite."""
    points = [(float(r["step"]), r["loss"]) for r in losses if r["loss"] is not None]
    kept = "was kept" if improved else "did not improve, and was not kept"
    if not points:
        words = "The held-out loss was NaN or Inf from the beginning, so nothing was trained."
        return el("p", f"Distillation: {words} Try model.dtype=float32 or bfloat16.")
    drawing = line_chart(
        f"Held-out loss by step, from {points[0][1]:.4f} to {points[-1][1]:.4f}.",
        [Series("held-out loss", points, "recovered", dots=True)],
        Axis("optimiser step", whole=True),
        Axis("held-out loss"),
    )
    numbers = table(
        ["Step", "Held-out loss"],
        [(f"{step:.0f}", text.number(loss, 5)) for step, loss in points],
        "Held-out loss by step",
    )
    return figure("Distillation", drawing, f"What was trained {kept}.", numbers)


def _spread(length: int, wanted: int) -> list[int]:
    """Indices from 0 to length - 1, closer together at the beginning."""
    if length <= wanted:
        return list(range(length))
    ratio = math.log(length) / (wanted - 1)
    return sorted({min(length - 1, round(math.exp(ratio * i)) - 1) for i in range(wanted)})
