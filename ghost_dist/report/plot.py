"""Charts: what is drawn and where, in units of an SVG that templates/plot.svg.j2 writes.

Made for a width of 360 units, which is a phone's; a desktop shows two side by side. Colours are
classes of page.css, so that the page's scheme rules; every series has a dash pattern too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ghost_dist.report.text import number

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 360, 54, 346, 14, 40  # RIGHT is a place, BOTTOM a margin
HEIGHT = 230
_MOST_POINTS = 240
_CHARACTER = 5.9  # units, of a character in a chart

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    title: str
    log: bool = False  # powers of ten; what is not positive is not drawn
    low: float | None = None  # end; None: that of the data
    high: float | None = None
    whole: bool = False  # ticks at whole numbers only


class Series(NamedTuple):
    name: str
    points: Sequence[Point]
    style: str  # its class of page.css
    dots: bool = False


class Mark(NamedTuple):
    point: Point
    label: str
    style: str


class Scale:
    """Data values to units along one side."""

    def __init__(self, axis: Axis, values: Sequence[float], first: float, last: float) -> None:
        self.axis, self.first, self.last = axis, first, last
        low = min(values) if axis.low is None else axis.low
        high = max(values) if axis.high is None else axis.high
        if axis.log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-9 * max(1.0, abs(high)):
            low, high = low - 0.5, high + 0.5
        margin = 0.04 * (high - low)
        self.low = low if axis.low is not None else low - margin
        self.high = high if axis.high is not None else high + margin

    def __call__(self, value: float) -> float:
        if self.axis.log:
            value = math.log10(value)
        share = (value - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)

    def ticks(self, about: int) -> list[tuple[float, str]]:
        """Places of round values within the axis, and their labels."""
        if self.axis.log:
            decades = range(math.ceil(self.low), math.floor(self.high) + 1)
            step = max(1, math.ceil(len(decades) / about))
            if len(decades) >= 2:
                return [(self(10.0**n), _power(n)) for n in decades if n % step == 0]
            values = _round_values(10**self.low, 10**self.high, about, whole=False)
            return [(self(value), number(value, 2)) for value in values]
        values = _round_values(self.low, self.high, about, whole=self.axis.whole)
        return [(self(value), f"{value:.6g}") for value in values]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A chart: what is drawn, and the scales that say where."""

    description: str  # what a screen reader says in its place
    x: Scale
    y: Scale
    series: Sequence[Series]
    marks: Sequence[Mark]

    def label_place(self, mark: Mark) -> Point:
        """Middle of its label, in units: above or below it, where there is room."""
        half = len(mark.label) * _CHARACTER / 2
        x, y = self.x(mark.point[0]), self.y(mark.point[1])
        return min(max(x, LEFT + half), WIDTH - 2 - half), y - 10 if y > TOP + 16 else y + 20


def line_chart(
    description: str, series: Sequence[Series], x: Axis, y: Axis, marks: Sequence[Mark] = ()
) -> Plot:
    """Lines over common axes, without what is not finite, or not positive where an axis is log."""

    def drawable(point: Point) -> bool:
        return all(
            math.isfinite(value) and (value > 0 or not axis.log)
            for value, axis in zip(point, (x, y), strict=True)
        )

    series = [one._replace(points=[p for p in one.points if drawable(p)]) for one in series]
    marks = [mark for mark in marks if drawable(mark.point)]
    everything = [p for one in series for p in one.points] + [mark.point for mark in marks]
    return Plot(
        description=description,
        x=Scale(x, [p[0] for p in everything], LEFT, RIGHT),
        y=Scale(y, [p[1] for p in everything], HEIGHT - BOTTOM, TOP),
        series=[one._replace(points=_thinned(one.points)) for one in series],
        marks=marks,
    )


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most _MOST_POINTS of them, the first and the last among them."""
    if len(points) <= _MOST_POINTS:
        return points
    step = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(i * step)] for i in range(_MOST_POINTS)]


def _round_values(low: float, high: float, about: int, *, whole: bool) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two values."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _power(exponent: int) -> str:
    """A power of ten, plain where that is short."""
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return f"1e{exponent}"
