"""Text for the pico model: the source of fixed modules of the user's own Python.

Every Python installation carries its standard library as source, so the demo needs no data file
and no network. The two lists below are disjoint and fixed: calibration text may have been seen by
the pico model in training, evaluation text (and what repeats it, such as its tests) never was;
`launch/train_pico.py` imports both lists. All modules exist in Python 3.11 to 3.13, also in
distributions that leave out `test` and `tkinter`. Their text differs a little between Python
versions, so a perplexity is compared only with figures of the same Python.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

CALIBRATION_MODULES: tuple[str, ...] = (
    "argparse",
    "subprocess",
    "logging",
    "threading",
    "inspect",
    "urllib.request",
    "http.client",
    "email.message",
    "shutil",
    "functools",
    "collections",
    "socket",
    "random",
    "tempfile",
    "asyncio.base_events",
    "xml.etree.ElementTree",
)

EVALUATION_MODULES: tuple[str, ...] = (
    "difflib",
    "ipaddress",
    "configparser",
    "textwrap",
    "shlex",
    "plistlib",
    "calendar",
    "gettext",
)


def stdlib_text(modules: Sequence[str], *, root: Path | None = None) -> str:
    """The source of modules of the running Python (or below ``root``), in the order given.

    A dotted name is a file in a package's folder, a package is its `__init__.py`. A module without
    a source file raises: a text with a part missing would give other figures unnoticed.
    """
    root, texts = root or Path(sysconfig.get_path("stdlib")), []
    for name in modules:
        stem = root.joinpath(*name.split("."))
        candidates = (stem.with_name(stem.name + ".py"), stem / "__init__.py")
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"no source of the standard library module {name!r} in {root}. This Python seems "
                "to lack its library sources: use an installation that has them (Python 3.11 to "
                "3.13)."
            )
        texts.append(path.read_text(encoding="utf-8"))
    return "".join(texts)
