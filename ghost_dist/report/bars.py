"""Perplexities as bars of a common scale, and numbers below the stack of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ghost_dist.evaluation.task_rows import VARIANTS
from ghost_dist.report.record import Pair, RunRecord

_LOGARITHMIC_FROM = 20.0
"""Ratio of the largest to the smallest bar from which bars on a linear scale would show nothing."""

_LABEL_DISTANCE = 0.075  # share of the width that two numbers below the stack must be apart


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


def numbers_below_stack(run: RunRecord) -> list[int]:
    """Layers where spans begin and end, and the ends if there is room."""
    num_layers = run.num_layers or 1
    wanted = [n for span in run.spans for n in span if n < num_layers]
    shown: list[int] = []
    for layer in dict.fromkeys([*wanted, 0, num_layers - 1]):
        if all(abs(layer - other) / num_layers >= _LABEL_DISTANCE for other in shown):
            shown.append(layer)
    return sorted(shown)
