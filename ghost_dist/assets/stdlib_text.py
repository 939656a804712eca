"""Text that every Python carries: the source of fixed modules for the pico model, prose for LLMs.

The two lists of modules are disjoint and fixed: calibration text may have been seen by the pico
model in training, evaluation text (and what repeats it, such as its tests) never was
(`launch/train_pico.py`). All exist in Python 3.11 to 3.13, also in distributions that leave out
`test` and `tkinter`. Their text differs a little between Python versions, so a perplexity is
compared only with figures of the same Python.

For real language models: the chapters of the language reference that ``help()`` prints, and
docstrings. It is prose about one subject: figures on it show that an operator works, no more.
"""

import ast
import sysconfig
from collections.abc import Sequence
from pathlib import Path

CALIBRATION_MODULES = (
    *("argparse", "subprocess", "logging", "threading", "inspect", "urllib.request"),
    *("http.client", "email.message", "shutil", "functools", "collections", "socket"),
    *("random", "tempfile", "asyncio.base_events", "xml.etree.ElementTree"),
)

EVALUATION_MODULES = (
    *("difflib", "ipaddress", "configparser", "textwrap"),
    *("shlex", "plistlib", "calendar", "gettext"),
)


def stdlib_text(modules: Sequence[str], *, root: Path | None = None) -> str:
    """The source of modules of the running Python (or below ``root``), in the order given.

    One without a source file raises: a text with a part missing would give other figures unnoticed.
    """
    root, texts = root or Path(sysconfig.get_path("stdlib")), []
    for name in modules:
        stem = root.joinpath(*name.split("."))
        path = stem / "__init__.py" if stem.is_dir() else stem.with_name(f"{stem.name}.py")
        if not path.is_file():
            raise FileNotFoundError(
                f"no source of the standard library module {name!r} in {root}. This Python seems "
                "to lack its library sources: use an installation that has them (Python 3.11 to "
                "3.13)."
            )
        texts.append(path.read_text(encoding="utf-8"))
    return "".join(texts)


CALIBRATION_TOPICS = (
    *("specialnames", "compound", "types", "formatstrings"),
    *("string-methods", "typesseq", "typesmapping"),
)

EVALUATION_TOPICS = (
    *("execmodel", "comparisons", "import"),
    *("strings", "objects", "operator-summary"),
)

DOCSTRING_MODULES = (
    *("threading", "smtplib", "email.message", "random"),
    *("socketserver", "os", "optparse", "ssl"),
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
