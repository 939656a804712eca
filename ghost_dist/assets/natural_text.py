"""English text for real language models that every Python installation carries.

Two kinds: the chapters of the Python language reference that ``help()`` prints, and docstrings of
the standard library. Chapters repeat each other in part; the two lists below do not. It is prose
about one subject, so figures on it show that an operator works, not what it is worth elsewhere;
they differ a little between Python versions.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

from ghost_dist.assets.stdlib_text import stdlib_text

CALIBRATION_TOPICS: tuple[str, ...] = (
    "specialnames",
    "compound",
    "types",
    "formatstrings",
    "string-methods",
    "typesseq",
    "typesmapping",
)

EVALUATION_TOPICS: tuple[str, ...] = (
    "execmodel",
    "comparisons",
    "import",
    "strings",
    "objects",
    "operator-summary",
)

DOCSTRING_MODULES: tuple[str, ...] = (
    "threading",
    "smtplib",
    "email.message",
    "random",
    "socketserver",
    "os",
    "optparse",
    "ssl",
)


def reference_text(topics: Sequence[str]) -> str:
    """Chapters of the language reference, by the names that ``help()`` knows, in this order."""
    from pydoc_data.topics import topics as chapters

    return "\n\n".join(chapters[topic].strip() for topic in topics) + "\n"


def docstring_text(modules: Sequence[str]) -> str:
    """Docstrings of the modules, classes and functions of standard library modules."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for name in modules for node in ast.walk(ast.parse(stdlib_text([name]))))
    found = (ast.get_docstring(node) for node in nodes if isinstance(node, documented))
    return "\n\n".join(text for text in found if text) + "\n"
