"""Imports go down the table of docs/design.md; heavy libraries and CUDA have one place each."""

import ast
import functools
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ghost_dist"

ROWS = [
    {"errors"},
    {"amounts", "devices", "durable", "ridge", "spans"},
    {"engine_config"},
    {"config"},
    {"config_file"},
    {"progress", "run_folder"},
    {"checkpoint"},
    {"calibration", "statistics"},
    {"engines"},
    {"evaluation"},
    {"solver", "refine"},
    {"export"},
    {"report"},
    {"pipeline"},
    {"planning"},
    {"assets", "real_models"},
    {"cluster", "demo"},
    {"api"},
    {"cli_jobs"},
    {"cli"},
    {"__main__", "job"},
]
"""Lowest first. A part may import parts of lower rows and itself."""

ONLY_IMPORTERS = {
    "ray": "cluster/",
    "deepspeed": "engines/tensor_parallel.py",
    "matplotlib": "report/",
    "lm_eval": "evaluation/harness.py",
    "zarr": "statistics/",
    "typer": "cli",
}


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def nodes_of(path):
    return tuple(ast.walk(ast.parse(path.read_text())))


def imports_of(path, *, at_once=False):
    for node in nodes_of(path):
        if at_once and getattr(node, "col_offset", 0):
            continue  # in a function
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def test_no_two_modules_have_one_name():
    names = [path.name for path in MODULES]
    assert {name for name in names if names.count(name) > 1} == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    rows = {part: number for number, parts in enumerate(ROWS) for part in parts}
    own = part_of(path)
    assert own in rows, f"{own} has no row in the table"
    for module in imports_of(path):
        if not module.startswith("ghost_dist."):
            continue
        other = module.split(".")[1]
        assert other == own or rows[other] < rows[own], f"{path.name} imports {module}"


@pytest.mark.parametrize(("library", "place"), ONLY_IMPORTERS.items())
def test_heavy_libraries_have_one_place(library, place):
    importers = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if any(name.split(".")[0] == library for name in imports_of(path))
    }
    assert all(name.startswith(place) for name in importers), importers


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_start_imports_no_library_that_is_used_later(path):
    """torch and transformers take seconds, and every run needs them at once."""
    late = {"datasets", "deepspeed", "jinja2", "lm_eval", "matplotlib", "zarr"}
    late |= set() if part_of(path) == "cluster" else {"ray"}
    assert not {name.split(".")[0] for name in imports_of(path, at_once=True)} & late


def uses_of_cuda(nodes):
    """Lines that ask torch for a GPU's streams, events, memory or present number."""
    for node in nodes:
        match node:
            case ast.Attribute(attr="cuda" | "accelerator"):
                yield node.lineno  # torch.cuda, torch.backends.cuda, tensor.cuda()
            case ast.Attribute(value=ast.Name("torch"), attr="Stream" | "Event"):
                yield node.lineno
            case ast.Import(names):
                if any(alias.name.startswith(("torch.cuda", "torch.backends")) for alias in names):
                    yield node.lineno
            case ast.ImportFrom(module=str(module), names=names):
                found = {f"{module}.{alias.name}" for alias in names}
                if any(
                    re.match(r"torch\.(backends|cuda|accelerator|Stream|Event)", f) for f in found
                ):
                    yield node.lineno


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_one_module_talks_to_cuda(path):
    """The others would have to name the device each time, and one day one does not."""
    if path.name != "devices.py":
        assert not list(uses_of_cuda(nodes_of(path)))


@pytest.mark.parametrize(
    "line",
    [
        "torch.cuda.synchronize(device)",
        "torch.backends.cuda.matmul.allow_tf32 = False",
        "model.cuda()",
        "torch.accelerator.current_stream()",
        "event = torch.Event('cuda')",
        "import torch.cuda",
        "from torch import cuda",
        "from torch.cuda import Stream",
    ],
)
def test_talking_to_cuda_is_noticed(line):
    assert list(uses_of_cuda(ast.walk(ast.parse(line)))) == [1]
