"""Charts for a terminal: tables of bars, and maps of characters, in whatever width there is."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
        most = max((v for v in value.values() if math.isfinite(v)), default=1.0)
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
    if len({row["span"][1] - row["span"][0] for row in rows}) > 1:
        return _map(run, {tuple(row["span"]): row["residual"] for row in rows})
    most = max(row["residual"] for row in rows) or 1.0
    table = Table("span", "unexplained after repair", "", "", box=None)
    for row in rows:
        taken = row["span"] in run.spans
        table.add_row(
            escape(text.span(row["span"])),
            bar(row["residual"] / most),
            text.percent(row["residual"], 1),
            "<- chosen" if taken else "",
            style="bold green" if taken else None,
        )
    return table


def _map(run: RunRecord, residuals: Mapping[tuple[int, ...], float]) -> RenderableType:
    least, most = min(residuals.values()), max(residuals.values())
    starts = range(min(residuals)[0], max(residuals)[0] + 1)
    lines = [Text("unexplained after repair: darker is easier to repair, X chosen", style="bold")]
    for length in sorted({stop - start for start, stop in residuals}, reverse=True):
        line = Text(f"{length:>4} layers ")
        for start in starts:
            here = (start, start + length)
            if list(here) in run.spans:
                line.append("XX", style="bold green")
            elif here in residuals:
                strength = (most - residuals[here]) / ((most - least) or 1.0)
                line.append(_SHADES[round(strength * (len(_SHADES) - 1))] * 2)
            else:
                line.append("  ")
        lines.append(line)
    lines.append(Text(f"from layer  {''.join(f'{n:<8}' for n in starts[::4])}"))
    return Group(*lines)


def ridge_curves(run: RunRecord) -> RenderableType | None:
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
                bar(min(1.0, residual / most)),
                text.number(residual),
                "<- taken" if taken else "",
                style="bold green" if taken else None,
            )
    return table


def bar(share: float) -> str:
    """A bar of eighths of a character; 1 (and infinity) fills the width."""
    if math.isnan(share):
        return ""
    eighths = round(8 * _BAR * min(1.0, max(0.0, share)))
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_PARTS[rest] if rest else "")
