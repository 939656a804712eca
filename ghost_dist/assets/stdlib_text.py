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
    """Return the source of `modules`, one after the other in the order given.

    A dotted name is a file in a package's folder, a package is its `__init__.py`. `root` is a
    standard library folder, by default that of the running Python. A module without a source file
    raises FileNotFoundError: a text with a part missing would give other figures unnoticed.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    return "".join(_source_file(name, root).read_text(encoding="utf-8") for name in modules)


def _source_file(name: str, root: Path) -> Path:
    """Return the file that holds the source of the module `name` below `root`."""
    stem = root.joinpath(*name.split("."))
    candidates = (stem.with_name(stem.name + ".py"), stem / "__init__.py")
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"no source of the standard library module {name!r} in {root} (looked for "
        f"{' and '.join(str(path.relative_to(root)) for path in candidates)}). This Python seems "
        "to lack its library sources: use an installation that has them (Python 3.11 to 3.13), "
        "or give another library folder as root."
    )
