"""HTML from Python values; whatever is not :class:`Html` is text and is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_VOID = {"meta", "br", "col", "rect", "line", "circle", "path", "polyline", "polygon", "hr"}


class Html(str):
    """A piece of finished HTML or SVG."""

    __slots__ = ()


Child = str | None | Iterable["Child"]


def el(tag: str, *children: Child, **attributes: object) -> Html:
    """One element.

    Parameters
    ----------
    tag
        Its name.
    children
        Html as it is, other text escaped, None left out, sequences in order.
    attributes
        ``class_`` and ``for_`` lose the underscore, others have hyphens for underscores; None and
        False are left out, True has no value.
    """
    parts = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(name)
        else:
            parts.append(f'{name}="{html.escape(str(value))}"')
    opening = f"<{' '.join(parts)}>"
    if tag in _VOID:
        return Html(f"{opening[:-1]}/>")
    return Html(f"{opening}{join(children)}</{tag}>")


def join(children: Iterable[Child]) -> Html:
    """Children one after the other."""
    found = []
    for child in children:
        if isinstance(child, Html):
            found.append(str(child))
        elif isinstance(child, str):
            found.append(html.escape(child, quote=False))
        elif child is not None:
            found.append(str(join(child)))
    return Html("".join(found))


def table(
    titles: Sequence[str],
    rows: Iterable[Sequence[Child]],
    caption: str,
    *,
    numbers: Sequence[int] | None = None,
    marked: Sequence[int] = (),
    scroll: bool = True,
) -> Html:
    """A table whose first column is the header of each row.

    Parameters
    ----------
    titles, rows
        Columns and cells.
    caption
        What it shows; also the name of the region that scrolls.
    numbers
        Columns set right, in figures of one width; None: all but the first.
    marked
        Rows set bold; something in the row must say why, too.
    scroll
        Whether it may be wider than the page: then it scrolls by itself, also by keyboard.
    """
    right = set(range(1, len(titles)) if numbers is None else numbers)

    def cell(column: int, content: Child) -> Html:
        kind = "number" if column in right else None
        if column == 0:
            return el("th", content, scope="row", class_=kind)
        return el("td", content, class_=kind)

    head = el(
        "tr",
        [
            el("th", title, scope="col", class_="number" if i in right else None)
            for i, title in enumerate(titles)
        ],
    )
    body = [
        el(
            "tr",
            [cell(column, content) for column, content in enumerate(row)],
            class_="marked" if number in marked else None,
        )
        for number, row in enumerate(rows)
    ]
    found = el("table", el("caption", caption), el("thead", head), el("tbody", body))
    if not scroll:
        return found
    return el("div", found, class_="scroll", tabindex="0", role="region", aria_label=caption)


def figure(
    title: str, drawing: Html, words: Child, numbers: Html | None, *, wide: bool = False
) -> Html:
    """A drawing with its title, what it says, and the numbers behind it."""
    return el(
        "figure",
        el("figcaption", el("strong", title), " ", words),
        drawing,
        None
        if numbers is None
        else el("details", el("summary", f"Numbers: {title[:1].lower()}{title[1:]}"), numbers),
        class_="wide" if wide else None,
    )


def section(anchor: str, title: str, *content: Child) -> Html:
    """A section with its heading."""
    return el(
        "section",
        el("h2", title, id=f"{anchor}-title"),
        content,
        id=anchor,
        aria_labelledby=f"{anchor}-title",
    )


def beside(left: Child, *right: Child) -> Html:
    """Two columns where there is room, else one after the other."""
    return el("div", left, el("div", right), class_="beside")
