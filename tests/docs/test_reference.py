"""The tables of docs/configuration.md and docs/cli.md are those of the code."""

from __future__ import annotations

import importlib.util
import re

import pytest
import typer
import yaml
from markdown_blocks import ROOT

from ghost_dist.cli import app
from ghost_dist.config import Config

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "launch" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["configuration.md", "cli.md"])
def test_page_is_as_generated(reference, name):
    page = (DOCS / name).read_text(encoding="utf-8")
    assert reference.with_tables(page) == page, "run: python launch/reference.py"


def test_every_field_has_a_row_with_its_default_and_a_meaning():
    """Read from the page itself, so that a mistake of the generator is seen too."""
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    rows = re.findall(
        r'^\| <span id="(.*?)">`(.*?)`</span> \| (.*) \| (.*) \| (.*) \|$', page, re.MULTILINE
    )
    shown = {name: (default, meaning) for _, name, _, default, meaning in rows}
    fields = {
        f"{section}.{name}": field
        for section, info in Config.model_fields.items()
        for name, field in info.annotation.model_fields.items()
    }
    assert set(shown) == set(fields)
    assert [anchor for anchor, *_ in rows] == [name for _, name, *_ in rows]
    for name, field in fields.items():
        default, meaning = shown[name]
        assert len(meaning) > 10, name
        if field.is_required():
            assert default == "required", name
            continue
        value = yaml.safe_load(default.strip("`"))
        expected = field.get_default(call_default_factory=True)
        assert value == (list(expected) if isinstance(expected, tuple) else expected), name


def test_every_command_and_option_is_listed():
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    section = r"^### (ghost-dist .*?)$(.*?)(?=^###|\Z)"
    sections = dict(re.findall(section, page, re.MULTILINE | re.DOTALL))

    def walk(command, name):
        inner = getattr(command, "commands", {})
        for inner_name, inner_command in inner.items():
            yield from walk(inner_command, f"{name} {inner_name}")
        if not inner:
            yield name, command

    commands = dict(walk(typer.main.get_command(app), "ghost-dist"))
    assert set(sections) == set(commands)
    for name, command in commands.items():
        assert command.help in sections[name]
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name} has no help"
            assert parameter.help.replace("|", r"\|") in sections[name]
            if parameter.param_type_name == "option":
                assert all(option in sections[name] for option in parameter.opts)
