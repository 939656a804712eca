"""MkDocs calls these for each page: docstrings speak reStructuredText, the site HTML."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Take the roles from what docstrings refer to, and let the keyboard scroll tables.

    ``:class:`Span``` is read as ``Span``. The theme scrolls tables in a frame that has no focus.
    """
    html = re.sub(r":(?:class|func|meth|attr|data|mod):(?=<code>)", "", html)
    html = html.replace("<table>", '<div class="wide" tabindex="0"><table>')
    return html.replace("</table>", "</table></div>")


def on_post_page(html: str, **_: Any) -> str:
    """Name what the theme leaves without a name for screen readers."""
    return html.replace('role="dialog"', 'role="dialog" aria-label="Search"')
