"""The messages that docs/faq.md quotes are those of the code."""

from __future__ import annotations

import ast
import re

import pytest
from markdown_blocks import ROOT, blocks

QUOTED = blocks(ROOT / "docs" / "faq.md", "text")
VARIABLE = "{}"


def template(node):
    """Text of a string or an f-string, what is put in at run time as ``{}``."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else VARIABLE for part in node.values
        )
    return None


def plain(text):
    """Blanks alike; the braces of a literal ``{relative: 0.1}`` are kept."""
    return " ".join(re.sub(r"\{(?![\w]+: )[^{}]*\}", VARIABLE, text).split())


@pytest.fixture(scope="module")
def templates():
    found = set()
    for path in (ROOT / "ghost_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = template(node)
            if text is not None and len(text) > 10:
                found.add(" ".join(text.split()))
    return found


def test_there_are_messages():
    assert len(QUOTED) > 25


@pytest.mark.parametrize("block", QUOTED, ids=lambda block: block.text[:40])
def test_message_is_in_the_code(templates, block):
    message = plain(block.text)
    assert len(message.replace(VARIABLE, "")) > 15, "too little of it is fixed"
    assert any(message in known for known in templates), message
