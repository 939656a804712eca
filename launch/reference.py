"""Writes the reference tables of docs/ from the code: fields of the configuration, the commands.

    python launch/reference.py            # launch/docs.sh does this first

Each table stands between two comments of its page, ``<!-- generated: NAME -->`` and
``<!-- end of NAME -->``; what is around them is written by hand.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ghost_dist.cli import app
from ghost_dist.config import Config

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    """Write the tables into their pages."""
    for name in ("configuration.md", "cli.md"):
        path = DOCS / name
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(page: str) -> str:
    """The page with every generated table as the code says now."""
    tables = dict(configuration_tables()) | dict(command_tables())

    def table(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in tables:
            sys.exit(f"error: docs ask for a table {name!r}; known: {', '.join(tables)}")
        return f"{begin}\n\n{tables[name]}\n\n{end}"

    pattern = r"(<!-- generated: (.+?) -->)\n.*?(<!-- end of \2 -->)"
    return re.sub(pattern, table, page, flags=re.DOTALL)


# --- configuration --------------------------------------------------------------------------------


def configuration_tables() -> Iterator[tuple[str, str]]:
    """Name of each section to its table."""
    for section, info in Config.model_fields.items():
        model = info.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        rows = [
            f'| <span id="{section}.{name}">`{section}.{name}`</span> | {_kind(field)} '
            f"| {_default(field)} | {_meaning(field)} |"
            for name, field in model.model_fields.items()
        ]
        head = ["| field | values | default | meaning |", "|---|---|---|---|"]
        yield section, "\n".join([*head, *rows])


def _kind(field: FieldInfo) -> str:
    return ", ".join(dict.fromkeys(_kinds(field.annotation, field.metadata)))


def _kinds(annotation: Any, limits: Sequence[Any] = ()) -> Iterator[str]:
    """What may be written there; values that stand for themselves as code."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _kinds(part, limits)
    elif origin is Literal:
        yield from (f"`{value}`" for value in get_args(annotation))
    elif hasattr(annotation, "__metadata__"):
        (info,) = annotation.__metadata__
        yield from _kinds(annotation.__origin__, getattr(info, "metadata", ()))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        (name,) = annotation.model_fields
        yield f"`{{{name}: number}}`"
    elif origin is tuple:
        yield "list"
    elif origin is dict:
        yield "names to sources"
    else:
        names = {str: "text", int: "integer", float: "number", bool: "`true`, `false`"}
        bounds = [
            f" {sign} {getattr(limit, name)}"
            for limit in limits
            for name, sign in (("ge", "≥"), ("gt", ">"))
            if getattr(limit, name, None) is not None and annotation in (int, float)
        ]
        yield "`null`" if annotation is type(None) else names[annotation] + "".join(bounds)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{text}`"


def _meaning(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split()).replace("``", "`").replace("|", r"\|")
    values = [v.strip("`") for v in _kinds(field.annotation) if v.startswith("`") and "{" not in v]
    if not values:
        return text
    # A value that is explained ("kl: ...") looks like one.
    value = "|".join(sorted(map(re.escape, values), key=len, reverse=True))
    return re.sub(rf"(?<![\w`-])(?:{value})(?=:| \()", r"`\g<0>`", text)


# --- commands -------------------------------------------------------------------------------------


def command_tables() -> Iterator[tuple[str, str]]:
    """One entry, ``commands``: every command with its arguments and options."""
    root = typer.main.get_command(app)
    yield "commands", "\n\n".join(_commands(root, "ghost-dist")).strip()


def _commands(command: Any, name: str) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    if not inner:
        yield _command(command, name)
    for inner_name, inner_command in inner.items():
        yield from _commands(inner_command, f"{name} {inner_name}")


def _command(command: Any, name: str) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join([name, *(_argument(p) for p in arguments), "[OPTIONS]" if options else ""])
    lines = [f"### {name}", "", command.help or "", "", "```text", usage.strip(), "```", ""]
    lines += ["| argument or option | default | meaning |", "|---|---|---|"]
    for parameter in [*arguments, *options]:
        if parameter in arguments:
            shown, default = _argument(parameter), "required" if parameter.required else ""
        else:
            shown, default = _option(parameter), _option_default(parameter)
        meaning = (parameter.help or "").replace("|", r"\|")
        if parameter.envvar:
            meaning += f" Else from `{parameter.envvar}`."
        shown = shown.replace(
            "|", "` or `"
        )  # a table has no way to write it that all readers share
        lines.append(f"| `{shown}` | {default} | {meaning} |")
    return "\n".join(lines)


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _option(parameter: Any) -> str:
    names = "/".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return names
    return f"{names} {parameter.metavar or parameter.name.upper()}"


def _option_default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.is_flag and not parameter.secondary_opts:
        return ""
    if parameter.is_flag:
        return f"`{(parameter.opts if parameter.default else parameter.secondary_opts)[0]}`"
    return "" if parameter.default is None else f"`{parameter.default}`"


if __name__ == "__main__":
    main()
