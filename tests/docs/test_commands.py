"""Every command that the documentation shows is one that the program takes; nothing is run here."""

from __future__ import annotations

import re
import tomllib

import pytest
import typer
from markdown_blocks import PAGES, ROOT, blocks, commands

from ghost_dist.cli import app
from ghost_dist.config_file import load_config, parse_set
from ghost_dist.errors import ConfigError

SHELL = [block for page in PAGES for block in blocks(page, "bash", "console")]
CASES = [(block, words) for block in SHELL for words in commands(block)]
OURS = [(block, words) for block, words in CASES if words[0] == "ghost-dist"]

FORM = re.compile(r"\b(MODEL|RUN\d*|CONFIG|FILE|FOLDER|OUT|HEAD|PATH)\b")
"""A word that stands for what a reader puts there."""
HOW_MUCH = ("selection.remove", "selection.spans", "selection.target")
"""One of these is in every configuration."""
RUN_BY_TESTS = {"launch/demo.sh", "launch/test.sh", "launch/docs.sh"}
"""The tutorial's test and CI run them (docs.sh: what it does is what tests/docs/test_site.py and
test_reference.py do)."""


def ids(cases):
    return [f"{block}:{' '.join(words)[:40]}" for block, words in cases]


INLINE = [
    (page, words)
    for page in PAGES
    for words in re.findall(r"`ghost-dist ([a-z][^`\n]*)`", page.read_text(encoding="utf-8"))
]
"""In the middle of a sentence: what follows the command may be left out."""


def test_there_are_commands():
    assert len(OURS) > 30
    assert len(INLINE) > 20


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_a_command_that_cannot_be_run_anywhere_says_what_it_needs(block):
    first = block.text.lstrip().splitlines()[0]
    if first.startswith("# needs ") or block.page.name == "tutorial.md":
        return
    for words in commands(block):
        run = words[0] == "bash" and words[1] in RUN_BY_TESTS
        own = words[0] not in ("ghost-dist", "bash")
        assert run or own or FORM.search(block.text), f"{block}: begin it with '# needs ...'"


@pytest.mark.parametrize(("block", "words"), OURS, ids=ids(OURS))
def test_command_exists_with_its_options(block, words):
    command = typer.main.get_command(app)
    words = words[1 : words.index(">") if ">" in words else None]
    while getattr(command, "commands", None):
        if words and words[0] in ("--version", "-h"):
            return
        assert words, f"{block}: no command"
        assert words[0] in command.commands, f"{block}: no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    options = {
        name: parameter
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("-")
    }
    given, arguments = [], []
    while words:
        word, *words = words
        if not word.startswith("-"):
            arguments += [word] if word != "..." else []  # "and so on"
            continue
        name, equals, value = word.partition("=")
        assert name in options, f"{block}: {command.name} has no option {name}"
        if not options[name].is_flag:
            if not equals and words:
                value, *words = words
            assert value or equals, f"{block}: {name} lacks its value"
            given.append((name, value))
    wanted = [p for p in command.params if p.param_type_name == "argument"]
    several = any(p.nargs == -1 for p in wanted)
    assert arguments or not wanted, f"{block}: an argument is missing"
    assert several or len(arguments) <= len(wanted), f"{block}: too many arguments {arguments}"
    if command.name in ("recover", "plan", "compare", "submit"):
        check_configuration(block, command.name, arguments[0], given)
    else:
        for name, value in given:
            if name == "--set":
                check_configuration(block, "recover", "MODEL", [("--remove", "7"), (name, value)])


def check_configuration(block, command, model, given):
    """What the arguments make is a configuration, as the command itself would build it."""
    overrides = {}
    path = None
    if model.endswith(".yaml"):
        path = ROOT / model
        if FORM.search(model):
            path = ROOT / "configs" / "pico_cpu.yaml"
        assert path.is_file(), f"{block}: there is no {model}"
    else:
        overrides["model.path"] = model
    overrides["output.path"] = "RUN"
    for name, value in given:
        if name == "--remove":
            first = value.split(",")[0] if command == "compare" else value
            overrides["selection.remove"] = int(first) if first.isdigit() else first
        elif name.startswith("--target-"):
            overrides["selection.target"] = f"{name.removeprefix('--target-')} {value}"
        elif name == "--spans":
            overrides["selection.spans"] = value
        elif name == "--operator":
            overrides["operator.name"] = value
        elif name == "--set" and value != "...":
            key, parsed = parse_set(value)
            overrides[key] = parsed
    if path is None and not set(HOW_MUCH) & set(overrides):
        overrides["selection.remove"] = 7  # "MODEL ..." leaves it out
    try:
        load_config(path, overrides)
    except ConfigError as error:
        pytest.fail(f"{block}: {error}")


@pytest.mark.parametrize(("page", "words"), INLINE)
def test_command_in_a_sentence_exists(page, words):
    command = typer.main.get_command(app)
    for word in words.split():
        known = getattr(command, "commands", None)
        if known:
            choices = word.split("|")  # status|logs|stop
            assert set(choices) <= set(known), f"{page.name}: ghost-dist {words}"
            command = known[choices[0]]
        elif word.startswith("--"):
            options = {n for p in command.params for n in (*p.opts, *p.secondary_opts)}
            assert word.partition("=")[0] in options, f"{page.name}: ghost-dist {words}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    here = r"(?<![\w/.])(?:configs|launch|tests|docs|ghost_dist)/[\w./-]*\w"
    for name in set(re.findall(here, text)):
        assert (ROOT / name).exists(), f"{page.name} names {name}, which does not exist"


EXTRAS = re.compile(r"pip install[^`\n]*?\[([\w,]+)\]")


def test_what_is_installed_can_be():
    """The package is on no index: it is installed from the checkout, with extras that it has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sources = [*PAGES, *(ROOT / "ghost_dist").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    named = set()
    for path in sources:
        text = path.read_text(encoding="utf-8")
        by_name = re.search(r"[Ii]nstall(?: -\S+)* [\"'`\s]*ghost_dist\b", text)
        assert by_name is None, f"{path.relative_to(ROOT)}: {by_name[0]}, which is on no index"
        named |= {extra for match in EXTRAS.findall(text) for extra in match.split(",")}
    assert named <= set(project["optional-dependencies"])
    assert {"cluster", "harness", "real"} <= named


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/tutorial.md"])
def test_the_environment_is_entered_before_its_commands(name):
    """launch/demo.sh installs into .venv, which a new shell does not know."""
    script = [words for block in blocks(ROOT / name, "bash") for words in commands(block)]
    assert ["bash", "launch/demo.sh"] in [words[:2] for words in script]
    first = next(number for number, words in enumerate(script) if words[0] == "ghost-dist")
    assert ["source", ".venv/bin/activate"] in script[:first]


def test_links_of_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target
