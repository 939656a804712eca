"""Drawings of the layer stack and of perplexities: HTML that fits any width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ghost_dist.report import text
from ghost_dist.report.markup import Html, el, join
from ghost_dist.report.record import VARIANTS, RunRecord

_LOGARITHMIC_FROM = 20.0
"""Ratio of the largest to the smallest bar from which bars on a linear scale would show nothing."""

_LABEL_DISTANCE = 0.075
"""Share of the width that two numbers below the stack must be apart."""


def stack(
    num_layers: int,
    spans: Sequence[Sequence[int]],
    operator: str,
    acting: bool,
    refitted: Sequence[int],
) -> Html:
    """Layers from the first to the last, the removed ones below the line, operators in the gaps.

    Parameters
    ----------
    num_layers
        Of the uncut model.
    spans
        Removed, half-open.
    operator
        Its name.
    acting
        Whether something acts at the gaps.
    refitted
        Layers whose down_proj is new.
    """
    words = f"{num_layers} layers; removed: {text.layers(spans)}."
    if acting:
        words += f" In each gap: {operator}."
    if refitted:
        words += f" New down_proj in layer {text.join_words([str(i) for i in refitted])}."
    parts: list[Html] = []
    layer = 0
    starts = {span[0]: span[1] for span in spans}
    while layer < num_layers:
        if layer in starts:
            removed = starts[layer] - layer
            bridge = (
                el("span", el("b", "W"), class_="bridge") if acting else el("span", class_="cut")
            )
            ghosts = el("span", [el("i") for _ in range(removed)], class_="ghosts")
            parts.append(el("span", bridge, ghosts, class_="gap", style=f"flex:{removed}"))
            layer = starts[layer]
        else:
            parts.append(el("i", class_="kept new" if layer in refitted else "kept"))
            layer += 1
    key = [
        el("li", el("i", class_="kept"), "kept"),
        el("li", el("i", class_="ghost"), "removed"),
        el("li", el("i", class_="bridge"), f"W: {operator}") if acting else None,
        el("li", el("i", class_="kept new"), "kept, down_proj refitted") if refitted else None,
    ]
    return join(
        [
            el(
                "div",
                el("div", parts, class_="layers"),
                el("div", _numbers(num_layers, spans), class_="ticks"),
                class_="stack",
                role="img",
                aria_label=words,
            ),
            el("ul", key, class_="key"),
        ]
    )


def stack_of(run: RunRecord) -> Html | None:
    """The stack of a run; None before its layers are known."""
    if run.num_layers is None or not run.spans:
        return None
    acting = run.operator not in (None, "none", "fold", "replaceme")
    refits = run.operator in ("ghost-joint", "fold", "replaceme")
    refitted = [start - 1 for start, _ in run.spans if start > 0] if refits else []
    refitted += [row["layer"] for row in run.healing if row["kept"]]
    return stack(run.num_layers, run.spans, run.operator or "", acting, refitted)


def _numbers(num_layers: int, spans: Sequence[Sequence[int]]) -> list[Html]:
    """Layer numbers below the stack: where spans begin and end, and the ends if there is room."""
    wanted = [n for start, stop in spans for n in (start, stop) if n < num_layers]
    wanted += [0, num_layers - 1]
    shown: list[int] = []
    for layer in dict.fromkeys(wanted):
        if all(abs(layer - other) / num_layers >= _LABEL_DISTANCE for other in shown):
            shown.append(layer)
    return [
        el("span", str(n), style=f"left:{100 * (n + 0.5) / num_layers:.2f}%") for n in sorted(shown)
    ]


def perplexity_bars(
    corpus: str,
    values: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float] | None],
    closed: tuple[float, tuple[float, float] | None] | None,
    windows: int | None,
) -> Html:
    """Bars of the dense, the pruned and the recovered model as a table.

    Where nothing was repaired the recovered model is the pruned one, and is not shown twice.

    Parameters
    ----------
    corpus
        Name.
    values, intervals
        By variant; intervals may be missing.
    closed
        Share of the cost of pruning that recovery gave back, and its interval.
    windows
        Evaluated ones.
    """
    shown = [n for n in VARIANTS if n != "recovered" or values[n] != values["pruned"]]
    rows = [(name, name, values[name], intervals.get(name)) for name in shown]
    about = [] if windows is None else [f"{windows} windows"]
    table, logarithmic = bars(f"{corpus}: perplexity", rows, "Model", "Perplexity")
    about += ["95 % intervals"] if any(intervals.get(name) for name in VARIANTS) else []
    about += ["bars on a logarithmic scale"] if logarithmic else []
    said: Html | None = None
    if closed is not None and values["recovered"] != values["pruned"]:
        share, pair = closed
        between = f" ({text.percent(pair[0])} to {text.percent(pair[1])})" if pair else ""
        said = el(
            "p", el("b", text.percent(share)), f" of the gap closed{between}", class_="gapline"
        )
    return el(
        "section",
        el("h3", corpus),
        table,
        said,
        el("p", "; ".join(about), class_="note") if about else None,
        class_="corpus",
    )


def bars(
    caption: str,
    rows: Sequence[tuple[str, str, float, tuple[float, float] | None]],
    title: str,
    value_title: str,
) -> tuple[Html, bool]:
    """Bars in a table: (label, style, value, interval); and whether their scale is logarithmic."""
    finite = [value for _, _, value, _ in rows if math.isfinite(value)]
    ends = [pair[1] for _, _, _, pair in rows if pair]
    most, least = max([*finite, *ends, 0.0]), min(finite, default=0.0)
    logarithmic = least > 0 and most / least > _LOGARITHMIC_FROM

    def along(value: float) -> float:
        if not math.isfinite(value):
            return 100.0
        if logarithmic:
            low = math.log(least) - 0.1 * (math.log(most) - math.log(least))
            return 100 * (math.log(value) - low) / (math.log(most) - low)
        return 100 * value / most if most > 0 else 0.0

    def bar(style: str, value: float, pair: tuple[float, float] | None) -> Html:
        whisker = None
        if pair is not None:
            low, high = along(pair[0]), along(pair[1])
            whisker = el("i", class_="whisker", style=f"left:{low:.1f}%;width:{high - low:.1f}%")
        filled = el("i", class_=f"bar {style}", style=f"width:{along(value):.1f}%")
        return el("div", filled, whisker, class_="track")

    body = [
        el(
            "tr",
            el("th", label, scope="row"),
            el("td", bar(style, value, pair), class_="drawn"),
            el(
                "td",
                el("b", text.perplexity(value)),
                el("span", text.interval(pair)) if pair else None,
                class_="number",
            ),
        )
        for label, style, value, pair in rows
    ]
    head = el(
        "tr",
        el("th", title, scope="col"),
        el("th", "Bar", scope="col"),
        el("th", value_title, scope="col"),
    )
    table = el("table", el("caption", caption), el("thead", head), el("tbody", body), class_="bars")
    return table, logarithmic


def share_bars(
    caption: str, titles: Sequence[str], rows: Sequence[tuple[str, float, Sequence[str]]]
) -> Html:
    """A table whose second column is a thin bar of a value against the largest.

    Parameters
    ----------
    caption, titles
        Titles of the label, the bar and the other columns.
    rows
        (label, value, other cells).
    """
    most = max([value for _, value, _ in rows], default=0.0) or 1.0
    body: list[Any] = [
        el(
            "tr",
            el("th", label, scope="row"),
            el(
                "td",
                el(
                    "div",
                    el("i", class_="bar dense", style=f"width:{100 * value / most:.1f}%"),
                    class_="track thin",
                ),
                class_="drawn",
            ),
            [el("td", cell, class_="number") for cell in cells],
        )
        for label, value, cells in rows
    ]
    head = el(
        "tr",
        [
            el("th", title, scope="col", class_="number" if i > 1 else None)
            for i, title in enumerate(titles)
        ],
    )
    return el("table", el("caption", caption), el("thead", head), el("tbody", body), class_="bars")
