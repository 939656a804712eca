"""MkDocs calls this for each page: docstrings speak reStructuredText, the site HTML."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Take the roles from what docstrings refer to: ``:class:`Span``` is read as ``Span``."""
    return re.sub(r":(?:class|func|meth|attr|data|mod):(?=<code>)", "", html)
