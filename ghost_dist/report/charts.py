"""Charts for a terminal: tables of bars, and maps of characters, in whatever width there is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ghost_dist.report import text
from ghost_dist.report.record import VARIANTS, RunRecord

_BAR = 24  # characters
_PARTS = " ▏▎▍▌▋▊▉█"
_SHADES = " ░▒▓█"
_STYLES = {"dense": "blue", "pruned": "red", "recovered": "green"}


def perplexity_bars(run: RunRecord) -> RenderableType | None:
    """Perplexity of the three models on every text, with intervals where they are known."""
    if not run.perplexity:
        return None
    table = Table("text", "model", "", "perplexity", "95 % interval", box=None)
    table.columns[3].justify = "right"
    intervals = run.intervals
    for corpus, value in run.perplexity.items():
        finite = [v for v in value.values() if math.isfinite(v)]
        most = max(finite, default=1.0)
        for variant in VARIANTS:
            table.add_row(
                escape(corpus) if variant == VARIANTS[0] else "",
                variant,
                Text(bar(value[variant] / most), style=_STYLES[variant]),
                text.perplexity(value[variant]),
                text.interval(intervals.get(corpus, {}).get(variant)),
            )
    return table


def recoverability(run: RunRecord) -> RenderableType | None:
    """What is left after repair: bars by first layer, or a map over first layer and length."""
    rows = run.selection.get("recoverability")
    if not rows:
        return None
    chosen = {(start, stop) for start, stop in run.spans}
    lengths = sorted({row["span"][1] - row["span"][0] for row in rows})
    if len(lengths) == 1:
        most = max(row["residual"] for row in rows) or 1.0
        table = Table("span", "unexplained after repair", "", "", box=None)
        for row in rows:
            taken = tuple(row["span"]) in chosen
            table.add_row(
                text.span(row["span"]).replace("[", r"\["),
                bar(row["residual"] / most),
                text.percent(row["residual"], 1),
                "<- chosen" if taken else "",
                style="bold green" if taken else None,
            )
        return table
    least = min(row["residual"] for row in rows)
    most = max(row["residual"] for row in rows)
    by_span = {tuple(row["span"]): row["residual"] for row in rows}
    starts = sorted({row["span"][0] for row in rows})
    lines = [Text("unexplained after repair: darker is easier to repair, X chosen", style="bold")]
    for length in reversed(lengths):
        line = Text(f"{length:>4} layers ")
        for start in range(starts[0], starts[-1] + 1):
            here = (start, start + length)
            if here in chosen:
                line.append("XX", style="bold green")
            elif here in by_span:
                line.append(shade((most - by_span[here]) / ((most - least) or 1.0)) * 2)
            else:
                line.append("  ")
        lines.append(line)
    marks = "".join(f"{n:<8}" for n in range(starts[0], starts[-1] + 1, 4))
    lines.append(Text(f"from layer  {marks}"))
    return Group(*lines)


def ridge_curves(run: RunRecord) -> RenderableType | None:
    """Held-out residual of every ridge of every span, the one taken marked."""
    curves = [fit for fit in run.fits if len(fit["ridge_curve"]) > 1]
    if not curves:
        return None
    table = Table("span", "ridge / median", "held-out residual (plain cut: 1)", "", "", box=None)
    for fit in curves:
        shown: Sequence[tuple[float, float]] = fit["ridge_curve"]
        most = max(1.0, min(2.0, max(residual for _, residual in shown)))
        for number, (ridge, residual) in enumerate(shown):
            taken = ridge == fit["relative_ridge"]
            table.add_row(
                text.span(fit["span"]).replace("[", r"\[") if number == 0 else "",
                text.number(ridge, 2),
                bar(min(1.0, residual / most)),
                text.number(residual),
                "<- taken" if taken else "",
                style="bold green" if taken else None,
            )
    return table


def bar(share: float, width: int = _BAR) -> str:
    """A bar of eighths of a character; 1 (and infinity) fills the width."""
    if math.isnan(share):
        return ""
    eighths = round(8 * width * min(1.0, max(0.0, share)))
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_PARTS[rest] if rest else "")


def shade(strength: float) -> str:
    """A character between empty and full."""
    return _SHADES[min(len(_SHADES) - 1, max(0, round(strength * (len(_SHADES) - 1))))]
