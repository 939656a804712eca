"""Line charts and heat maps as hand-written SVG.

Written for a width of 360 units, which is a phone's: text keeps its size there, and a desktop shows
two side by side. Colours are classes of page.css, so that the page's scheme rules; every series has
a dash pattern and a name at its side too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ghost_dist.report.markup import Html, el, join
from ghost_dist.report.text import number

WIDTH, HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 14, 40
_MOST_POINTS = 240
_CHARACTER = 5.9  # units, of a character in a chart

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes
    ----------
    title
        What it shows, with its unit.
    log
        Powers of ten; values must be positive.
    low, high
        Ends; None: those of the data.
    whole
        Ticks at whole numbers only.
    """

    title: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    whole: bool = False


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes
    ----------
    name
        Written beside it.
    points
        In the order in which they are joined; not finite ones, and those not positive on a
        logarithmic axis, are left out.
    style
        Class of page.css: ``dense``, ``pruned``, ``recovered``, or ``s0`` to ``s3``.
    dots
        Draw its points too.
    """

    name: str
    points: Sequence[Point]
    style: str = "s0"
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A point that is pointed out, with its label."""

    point: Point
    label: str
    style: str = "s0"


class _Scale:
    """Data values to units along one side."""

    def __init__(self, axis: Axis, values: Sequence[float], first: float, last: float) -> None:
        self.axis, self._first, self._last = axis, first, last
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
        return self._first + share * (self._last - self._first)

    def ticks(self, about: int) -> list[tuple[float, str]]:
        """Round values within the axis and their labels."""
        if self.axis.log:
            decades = range(math.ceil(self.low), math.floor(self.high) + 1)
            step = max(1, math.ceil(len(decades) / about))
            if len(decades) >= 2:
                return [(10.0**n, _power(n)) for n in decades if n % step == 0]
            low, high = 10**self.low, 10**self.high
            return [(v, number(v, 2)) for v in _round_values(low, high, about, whole=False)]
        values = _round_values(self.low, self.high, about, whole=self.axis.whole)
        return [(value, _plain(value)) for value in values]


def line_chart(
    description: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    marks: Sequence[Mark] = (),
    height: int = HEIGHT,
) -> Html:
    """Lines over common axes.

    Parameters
    ----------
    description
        What a screen reader says in the place of the drawing.
    series
        At least one with a point that can be drawn.
    x, y
        Axes.
    marks
        Points pointed out.
    height
        In units; the width is 360.

    Returns
    -------
    Html
        An ``svg`` element.
    """

    def drawable(point: Point) -> bool:
        return all(
            math.isfinite(value) and (value > 0 or not axis.log)
            for value, axis in zip(point, (x, y), strict=True)
        )

    lines = [[p for p in s.points if drawable(p)] for s in series]
    marks = [mark for mark in marks if drawable(mark.point)]
    everything = [p for line in lines for p in line] + [mark.point for mark in marks]
    across = _Scale(x, [p[0] for p in everything], _LEFT, WIDTH - _RIGHT)
    up = _Scale(y, [p[1] for p in everything], height - _BOTTOM, _TOP)
    parts: list[Html] = [_frame(across, up, height)]
    for one, line in zip(series, lines, strict=True):
        shown = [(across(px), up(py)) for px, py in _thinned(line)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in shown)
        parts.append(el("polyline", points=path, class_=f"line {one.style}"))
        if one.dots:
            parts += [
                el("circle", cx=f"{px:.1f}", cy=f"{py:.1f}", r="2.4", class_=f"dot {one.style}")
                for px, py in shown
            ]
    for mark in marks:
        parts.append(_mark(across(mark.point[0]), up(mark.point[1]), mark))
    drawing = _svg(description, height, parts)
    return join([_key(series), drawing]) if len(series) > 1 else drawing


def heat_map(
    description: str,
    cells: Sequence[tuple[int, int, float, str]],
    chosen: Sequence[tuple[int, int]],
    x_title: str,
    y_title: str,
    scale_title: str,
) -> Html:
    """Cells over whole numbers; the smaller the value, the stronger the colour.

    Parameters
    ----------
    description
        For a screen reader.
    cells
        (x, y, value, what the pointer is told).
    chosen
        Cells drawn with a frame.
    x_title, y_title, scale_title
        Axes and colour.
    """
    columns, rows = [c[0] for c in cells], [c[1] for c in cells]
    first, last, lowest, highest = min(columns), max(columns), min(rows), max(rows)
    width = (WIDTH - _LEFT - _RIGHT) / (last - first + 1)
    tall = min(24.0, max(4.0, 200 / (highest - lowest + 1)))
    height = round(_TOP + _BOTTOM + tall * (highest - lowest + 1))
    values = [cell[2] for cell in cells]
    least, most = min(values), max(values)

    def strength(value: float) -> float:
        return 1.0 if most == least else 0.06 + 0.94 * (most - value) / (most - least)

    def place(column: int, row: int) -> dict[str, str]:
        return {
            "x": f"{_LEFT + width * (column - first):.1f}",
            "y": f"{_TOP + tall * (highest - row):.1f}",
            "width": f"{width:.1f}",
            "height": f"{tall:.1f}",
        }

    parts = []
    for column, row, value, told in cells:
        look = {"class_": "heat", "fill_opacity": f"{strength(value):.2f}", **place(column, row)}
        if len(cells) <= 1500:
            rectangle = el("rect", **look)
            parts.append(el("g", el("title", told), rectangle))
        else:
            parts.append(el("rect", **look))
    parts += [el("rect", class_="chosen", **place(*cell)) for cell in chosen]
    step_x = max(1, math.ceil((last - first + 1) / 9))
    for column in range(first, last + 1, step_x):
        middle = _LEFT + width * (column - first + 0.5)
        parts.append(_label(middle, height - _BOTTOM + 14, str(column), "middle"))
    step_y = max(1, math.ceil(12 / tall))
    for row in range(lowest, highest + 1, step_y):
        middle = _TOP + tall * (highest - row + 0.5) + 4
        parts.append(_label(_LEFT - 6, middle, str(row), "end"))
    parts.append(_label((_LEFT + WIDTH - _RIGHT) / 2, height - 8, x_title, "middle"))
    parts.append(_turned(y_title, (_TOP + height - _BOTTOM) / 2))
    steps = [least + (most - least) * i / 4 for i in range(5)]
    scale = [
        el("li", el("i", style=f"opacity:{strength(v):.2f}", class_="heat"), number(v, 2))
        for v in (steps if most > least else steps[:1])
    ]
    legend = el("ul", el("li", scale_title), scale, class_="key")
    return join([legend, _svg(description, height, parts)])


def _svg(description: str, height: int, parts: Sequence[Html]) -> Html:
    return el(
        "svg",
        el("title", description),
        parts,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=description,
        focusable="false",
    )


def _frame(across: _Scale, up: _Scale, height: int) -> Html:
    """Axes, their ticks and titles."""
    floor, right = height - _BOTTOM, WIDTH - _RIGHT
    parts = [el("line", x1=_LEFT, x2=right, y1=floor, y2=floor, class_="axis")]
    for value, label in across.ticks(6):
        at = across(value)
        parts.append(
            el("line", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=floor, y2=floor + 4, class_="axis")
        )
        parts.append(_label(at, floor + 15, label, "middle"))
    for value, label in up.ticks(5):
        at = up(value)
        parts.append(el("line", x1=_LEFT, x2=right, y1=f"{at:.1f}", y2=f"{at:.1f}", class_="grid"))
        parts.append(_label(_LEFT - 6, at + 4, label, "end"))
    parts.append(_label((_LEFT + right) / 2, height - 6, across.axis.title, "middle"))
    parts.append(_turned(up.axis.title, (_TOP + floor) / 2))
    return el("g", parts)


def _mark(at: float, height: float, mark: Mark) -> Html:
    """A ring and its label, on the side where there is room."""
    half = len(mark.label) * _CHARACTER / 2
    left = min(max(at, _LEFT + half), WIDTH - 2 - half)
    above = height - 10 if height > _TOP + 16 else height + 20
    return el(
        "g",
        el("circle", cx=f"{at:.1f}", cy=f"{height:.1f}", r="5", class_=f"ring {mark.style}"),
        el(
            "text", mark.label, x=f"{left:.1f}", y=f"{above:.1f}",
            text_anchor="middle", class_="mark",
        ),
    )  # fmt: skip


def _key(series: Sequence[Series]) -> Html:
    """Names of the lines beside a piece of each."""
    return el(
        "ul",
        [
            el(
                "li",
                el(
                    "svg",
                    el("line", x1=0, x2=26, y1=5, y2=5, class_=f"line {one.style}"),
                    viewBox="0 0 26 10",
                    aria_hidden="true",
                    focusable="false",
                    class_="sample",
                ),
                one.name,
            )
            for one in series
        ],
        class_="key",
    )


def _label(x: float, y: float, text: str, anchor: str) -> Html:
    return el("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _turned(text: str, middle: float) -> Html:
    return el(
        "text", text, text_anchor="middle", transform=f"translate(11 {middle:.1f}) rotate(-90)"
    )


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most _MOST_POINTS of them, the first and the last among them."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    step = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(i * step)] for i in range(_MOST_POINTS)]


def _round_values(low: float, high: float, about: int, *, whole: bool) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two values."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    values = []
    while first * step <= high + 1e-9 * step:
        values.append(first * step)
        first += 1
    return values


def _plain(value: float) -> str:
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def _power(exponent: int) -> str:
    """A power of ten, plain where that is short."""
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return f"1e{exponent}".replace("-", "\N{MINUS SIGN}")
