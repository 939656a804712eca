"""Modules, functions and files that README, docs, docstrings and comments name are there."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest
from markdown_blocks import ROOT

import ghost_dist
from ghost_dist.config import Config

PACKAGE = ROOT / "ghost_dist"
PAGES = [
    ROOT / "README.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "log.md"),  # history
    *sorted((ROOT / "configs").glob("*.yaml")),
    *sorted((ROOT / "launch").glob("*.sh")),
]
PARTS = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("_")}
SUFFIXES = ("ahead", "html", "j2", "json", "unverified", "yaml")
"""Of files and folders: `report.html`, `checkpoint.unverified`."""

PYTHON_NAME = re.compile(r"\bghost_dist(?:\.[A-Za-z_]\w*)+")
FILE = re.compile(r"(?<![\w./<{*$-])(?:[\w.-]+/)+[\w-]+(?:\.py|\.sh|\.py\.txt)\b(?!\.\w)")
QUOTED = re.compile(r"`([A-Za-z_][\w./]*)`")
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?\.?([\w.]+)`")
ELSEWHERE = {
    *("html/entities.py", "test_difflib.py", "poplib.py"),  # of Python
    *("llama.cpp/convert_hf_to_gguf.py", "convert_hf_to_gguf.py"),
    *("lib/data.py", "generate.py", "__init__.py", "modeling_ghost_FAMILY.py"),  # a user's own
}


def texts_of_code(path):
    """Docstrings with the names around them, and comments."""
    source = path.read_text(encoding="utf-8")

    def walk(node, classes):
        for inner in ast.iter_child_nodes(node):
            inside = [*classes, inner.name] if isinstance(inner, ast.ClassDef) else classes
            if isinstance(inner, ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(inner) or "", inside
            elif isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant):
                yield str(inner.value.value), inside  # behind an attribute
            yield from walk(inner, inside)

    tree = parsed(path)
    yield ast.get_docstring(tree) or "", []
    yield from walk(tree, [])
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string, []


@functools.cache
def members(path, name=None):
    """Names that a module, or a class in it, defines or imports."""
    body = parsed(path).body
    if name is not None:
        body = next((n.body for n in body if isinstance(n, ast.ClassDef) and n.name == name), [])
    found = set()
    for node in ast.walk(ast.Module(body, [])) if name else body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id if isinstance(t, ast.Name) else getattr(t, "attr", "") for t in targets}
    return found


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def module_file(parts):
    """File of a module, or folder of a package; None if there is none."""
    path = PACKAGE.joinpath(*parts)
    return (
        path if path.is_dir() else next((p for p in [path.with_suffix(".py")] if p.exists()), None)
    )


@functools.cache
def names_something(parts):
    """Whether ``part.module.Class.name``, without the package's name, is there."""
    for length in range(len(parts), -1, -1):
        file = module_file(parts[:length])
        if file is not None:
            break
    rest = list(parts[length:])
    if not rest or (length == 0 and rest[0] in ghost_dist.__all__):
        return True
    file = file / "__init__.py" if file.is_dir() else file
    return rest[0] in members(file) and (len(rest) == 1 or rest[1] in members(file, rest[0]))


def is_field(parts):
    """Whether it is a field of the configuration, or the beginning of one (``cluster.max_``)."""
    section = Config.model_fields.get(parts[0])
    if section is None:
        return False
    return any(name.startswith(parts[1]) for name in section.annotation.model_fields)


@functools.cache
def modules_called(stem):
    return [path for path in PACKAGE.rglob("*.py") if path.stem == stem]


@functools.cache
def attributes():
    """Names in all classes of the package."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef):
                found |= members(path, node.name)
    return found


def is_file(name, folder):
    places = (ROOT, PACKAGE, ROOT / "tests", ROOT / "docs", folder)
    return any((place / name).exists() for place in places)


def wrong_names(text, folder):
    """Mentions in a text, which stands in a folder, of what is not there."""
    for match in PYTHON_NAME.finditer(text):
        if not names_something(tuple(match[0].split(".")[1:])):
            yield match[0]
    for match in FILE.finditer(text):
        if match[0] not in ELSEWHERE and not is_file(match[0], folder):
            yield match[0]
    for match in QUOTED.finditer(text):
        parts = tuple(match[1].split("."))
        if "/" in match[1]:
            path = Path(match[1])
            if path.parts[0] in PARTS and not path.suffix and module_file(path.parts) is None:
                yield match[1]
        elif parts[-1] == "py":
            if len(parts) == 2 and not modules_called(parts[0]) and match[1] not in ELSEWHERE:
                yield match[1]
        elif len(parts) > 1 and parts[-1] not in SUFFIXES and not is_field(parts):
            if parts[0] in PARTS - {"config"}:
                if not names_something(parts):
                    yield match[1]
            elif modules := modules_called(parts[0]):  # a module of the folder, or a variable
                named = [parts[1] in members(module) for module in modules]
                if not any(named) and parts[1] not in attributes():
                    yield match[1]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_pages(path):
    assert sorted(set(wrong_names(path.read_text(encoding="utf-8"), path.parent))) == []


def test_names_in_the_code():
    wrong = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        known = members(path)
        for text, classes in texts_of_code(path):
            where = str(path.relative_to(PACKAGE))
            wrong |= {(where, name) for name in wrong_names(text, path.parent)}
            inside = {name for one in classes for name in members(path, one)}
            for role in ROLE.finditer(text):
                first, *rest = role[1].removeprefix("ghost_dist.").split(".")
                here = first in known | inside
                if here and first in {*classes} and rest:
                    here = rest[0] in members(path, first)
                if not here and not names_something((first, *rest)):
                    wrong.add((where, role[0]))
    assert sorted(wrong) == []


@pytest.mark.parametrize(
    "text",
    [
        "`ghost_dist.statistics.stores`",
        "ghost_dist.statistics.store.StatisticsStor",
        "ghost_dist.statistics.store.StatisticsStore.opened",
        "see pipeline/agains.py",
        "`solver/ghosts`",
        "``solver.ghosts``",
        "`refine.stepz`",
    ],
)
def test_a_wrong_name_is_seen(text):
    assert list(wrong_names(text, ROOT))
