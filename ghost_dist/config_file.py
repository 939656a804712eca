"""Configurations from and to YAML, ``--set section.field=value`` and plain values.

What is wrong with one, and in what two differ, is said in words here.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import ValidationError

from ghost_dist.amounts import shown
from ghost_dist.config import Config
from ghost_dist.errors import ConfigError
from ghost_dist.ridge import AbsoluteRidge, RelativeRidge
from ghost_dist.spans import Span, pairs_of

MAY_DIFFER = (
    *("output.", "engine.kind", "engine.replicas", "engine.experts", "cluster.", "evaluation."),
)
"""Fields, or beginnings of their names, that may differ when a run is continued: nothing before
depends on what the finished model is measured on; and where it runs, on how many copies of the
model, and how much of it is at hand changes its sums by last bits at most (experts in parts on a
CPU). Sums of ranks that share layers are others, and are told apart by the statistics."""


AMOUNTS = ("selection.remove", "selection.target", "selection.pareto")
"""The same with ``selection.pareto``: another amount is chosen of what was searched for."""


_WAYS = ("remove", "target", "spans", "sublayers")

Spans = str | Sequence[Span | Sequence[int]]
"""``"11:18"``, ``[(11, 18)]`` or ``[Span(11, 18)]``: half open, counted from 0."""


def decisive_tree(config: Config) -> dict[str, Any]:
    """:func:`config_tree` without what may differ between two runs with the same result."""
    tree = config_tree(config)
    del tree["output"], tree["cluster"]
    for field in ("kind", "replicas", "experts"):
        del tree["engine"][field]
    return tree


def config_tree(config: Config) -> dict[str, Any]:
    """Nested plain values of ``config``, ready for YAML or JSON; spans become pairs."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    spans = config.selection.spans
    tree["selection"]["spans"] = None if spans is None else pairs_of(spans)
    return tree


def make_config(
    model: str | Path,
    *,
    out: str | Path | None = None,
    remove: int | str | None = None,
    spans: Spans | None = None,
    operator: str | None = None,
    settings: Mapping[str, Any] | None = None,
    runs: bool = True,
) -> Config:
    """The configuration of a run.

    Parameters
    ----------
    model
        A checkpoint folder, a hub id, or a YAML file (``.yaml``, ``.yml``) that holds a whole run,
        on which the other arguments are laid.
    out
        The RUN folder.
    remove
        How much goes: layers (``7``), a share of the parameters (``"20%"``), or bytes (``"4GB"``).
    spans
        Or exactly which layers.
    operator
        ``auto``, ``ghost``, ``ghost-joint``, ``fold``, ...
    settings
        Any field, ``{"calibration.windows": 64}``; these win.
    runs
        Whether it is to be run, for which it needs ``out``; not for a plan.

    Raises
    ------
    ConfigError
        If a field is unknown or a value not valid; names it and what is allowed.

    Examples
    --------
    >>> config = make_config("my-model", remove=7, out="RUN", settings={"calibration.windows": 64})
    >>> config.calibration.windows, config.selection.remove
    (64, 7)
    >>> make_config("my-model", spans=[(11, 18)], out="RUN").selection.spans
    (Span(start=11, stop=18),)
    """
    model = str(model)
    is_file = model.endswith((".yaml", ".yml"))
    overrides: dict[str, Any] = {} if is_file else {"model.path": model}
    if isinstance(remove, str) and remove.isdigit():
        remove = int(remove)
    if spans is not None and not isinstance(spans, str):
        spans = [[s.start, s.stop] if isinstance(s, Span) else list(s) for s in spans]
    given = {
        "output.path": None if out is None else str(out),
        "selection.spans": spans,
        "selection.remove": remove,
        "operator.name": operator,
    }
    overrides |= {key: value for key, value in given.items() if value is not None}
    overrides |= settings or {}
    return load_config(Path(model) if is_file else None, overrides, runs=runs)


def load_config(path: Path | None, overrides: Mapping[str, Any], *, runs: bool = True) -> Config:
    """Read a YAML file (or nothing) and lay ``section.field`` overrides on it.

    Values of overrides that are strings are not parsed here. A ConfigError names the field, what
    was given, what is allowed, and for an unknown key the nearest known one.
    """
    tree = {} if path is None else _read(path)
    lay(tree, overrides)
    if not runs and isinstance(output := tree.setdefault("output", {}), dict):
        output.setdefault("path", ".")
    try:
        return config_from_tree(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}" if path is not None else str(error)) from None


def shown_tree(path: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`config_tree` of a file, to be shown: what of it is gone stands there as it was."""
    tree, gone, now = _read(path), {}, {}
    for key, valid in {"operator.name": "auto", "selection.criterion": "search", **_GONE}.items():
        section, field = key.split(".")
        fields = tree.get(section)
        said = fields.get(field, valid) if isinstance(fields, dict) else valid
        if said != valid and (key in _GONE or str(said) in INSTEAD):
            gone[key], now[key] = said, valid
    shown = config_tree(load_config(path, {**overrides, **now}))
    for key, said in gone.items():
        set_field(shown, key, said)
    return shown


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _YamlLoader)
    except OSError as error:
        raise ConfigError(f"Configuration file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"Configuration file {path} is not valid YAML: {_said(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"Configuration file {path} must hold sections, such as model: ...")
    return tree


def lay(tree: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Lay ``section.field`` values on a configuration's nested dictionaries.

    What says how much or which layers go takes the place of what says it in the tree.
    """
    said = {way for way in _WAYS if overrides.get(f"selection.{way}")}
    fields = tree.get("selection")
    for way in _WAYS if said else ():
        # Spans and sublayers go together.
        if isinstance(fields, dict) and not {way, *said} <= {"spans", "sublayers"}:
            fields.pop(way, None)
    for key, value in overrides.items():
        set_field(tree, key, value)


def set_field(tree: dict[str, Any], key: str, value: Any) -> None:
    """Lay ``section.field`` on nested dictionaries.

    What is below a field takes the place of the whole field (``operator.ridge.relative``), but one
    is added where a field holds names (``evaluation.corpora``).
    """
    section, *path = key.split(".")
    if not path:
        tree[section] = value
        return
    field, *below = path
    fields = tree.get(section) or {}
    if not isinstance(fields, dict):
        raise ConfigError(
            f"{key}: {section} holds {shown(fields)}, expected fields, such as {field}."
        )
    for part in reversed(below):
        value = {part: value}
    known = _KEYS.get(section, {}).get(field)
    if below and known is not None and get_origin(known.annotation) is dict:
        value = {**(fields.get(field) or {}), **value}
    tree[section] = {**fields, field: value}


def parse_set(assignment: str) -> tuple[str, Any]:
    """Split ``section.field=value``; the value is read as YAML."""
    key, separator, text = assignment.partition("=")
    key = key.strip()
    if not separator or "." not in key:
        raise ConfigError(
            f"--set {assignment}: expected section.field=value, for example "
            "--set calibration.windows=64."
        )
    try:
        return key, yaml.load(text, _YamlLoader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {assignment}: the value is not valid YAML: {_said(error)}"
        ) from error


def _said(error: Exception) -> str:
    return str(error).replace(' in "<unicode string>",', " at")


_GONE = {
    "selection.units": "layers",
    "selection.min_length": 1,
    "selection.max_length": None,
    "operator.heal": False,
    "operator.rank": None,
    "engine.backend": "deepspeed",
}
"""Fields of earlier versions, which a RUN of then names: the value that is as if it were absent."""

INSTEAD = {
    **dict.fromkeys(("linear-patch", "linear-patch-hadamard", "low-rank"), "ghost"),
    "replaceme": "fold",
    **dict.fromkeys(("cosine", "angular", "block-influence"), "search, or paper"),
    "recoverability": "search (of one span: selection.max_spans=1), or paper",
}
"""Values of earlier versions, and what to give now."""


def config_from_tree(tree: Mapping[str, Any]) -> Config:
    """Validate plain nested dictionaries; see :func:`load_config` for what is raised."""
    known = {
        section: {k: v for k, v in fields.items() if v != _GONE.get(f"{section}.{k}", ...)}
        if isinstance(fields, dict)
        else fields
        for section, fields in tree.items()
    }
    try:
        return Config.model_validate({"model": {}, "selection": {}, "output": {}, **known})
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None


def config_yaml(config: Config) -> bytes:
    """``config`` as YAML, as :func:`load_config` reads it back."""
    return yaml.dump(config_tree(config), Dumper=_YamlDumper, sort_keys=False).encode()


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describe ``section.field`` entries in which two configuration trees differ."""
    lines = []
    for section in sorted({*old, *new}):
        before, after = old.get(section) or {}, new.get(section) or {}
        for field in sorted({*before, *after}):
            a, b = before.get(field), after.get(field)
            if a != b:
                lines.append(f"{section}.{field}: {shown(a)} in RUN, {shown(b)} now")
    return lines


class _YamlLoader(yaml.SafeLoader):
    """With the numbers of YAML 1.2; in 1.1 ``1e-6`` is text, and ``11:18`` is 678, in base 60."""


class _YamlDumper(yaml.SafeDumper):
    """Quotes what :class:`_YamlLoader` would take for a number."""


_NUMBERS = {
    "float": r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.inf|\.nan",
    "int": r"[-+]?\d+",
}
_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    for _class in (_YamlLoader, _YamlDumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list("-+.0123456789")
        )


def _describe(error: ValidationError) -> str:
    lines: list[str] = []
    expected: dict[str, tuple[Any, list[str]]] = {}  # a field may be one of several things
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        where = ".".join(part for part in location if not _ALTERNATIVE.match(part))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = list(_KEYS[location[-2] if len(location) > 1 else ""])
            near = _nearest(location[-1], known)
            full = ".".join([*where.split(".")[:-1], near or ""])
            hint = f"did you mean {full}?" if near else f"known: {', '.join(sorted(known))}."
            if where in _GONE:
                hint = "what it asks for was of an earlier version and is gone. Remove the line."
            lines.append(f"Unknown configuration key {where}: {hint}")
        elif item["type"] == "missing":
            arguments = {"model.path": " (the MODEL argument)", "output.path": " (--out RUN)"}
            hint = arguments.get(where, "")
            lines.append(f"Configuration field {where} is missing{hint}.")
        elif not where:  # of several sections
            lines.append(f"{message.rstrip('.')}.")
        elif message.startswith(("Input should be ", "String should ")):
            words = expected.setdefault(where, (item["input"], []))[1]
            kind = _PYDANTICS.sub("", message)
            words.append(_PLAIN.get(kind, kind))
        else:
            # Of a whole section what was given is no help.
            got = "" if where.count(".") == 0 else f" (got {shown(item['input'])})"
            lines.append(f"{where}: {message.rstrip('.')}{got}.")
    for where, (got, words) in expected.items():
        allowed = " or ".join(words)
        near = _nearest(got, re.findall(r"'(.*?)'", allowed)) if isinstance(got, str) else None
        hint = f" Did you mean {near}?" if near else ""
        if isinstance(got, str) and got in INSTEAD:
            hint = f" It was of an earlier version and is gone: give {INSTEAD[got]}."
        lines.append(f"{where}: got {shown(got)}, expected {allowed}.{hint}")
    return "\n".join(dict.fromkeys(lines))


_ALTERNATIVE = re.compile(r"literal\[|constrained-|function-|(str|bool|int|float|auto|\w+Ridge)$")
"""Parts of a place that pydantic names after the kinds of value that a field may have."""
_PYDANTICS = re.compile(
    "^Input should be |^String should |, (unable to|got a number) .*| or instance of .*"
)
"""Words of its messages that say nothing to a user."""
_PLAIN = {
    "a valid tuple": "a list",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid dictionary": "names and values, such as {name: FILE}",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "have at least 1 character": "text of at least 1 character",
    r"match pattern '^(auto|cpu|cuda(:\d+)?)$'": "auto, cpu, cuda or cuda:0",
}


_SECTIONS: dict[str, Any] = {name: of.annotation for name, of in Config.model_fields.items()}
_MODELS = {"": Config, **_SECTIONS, "RelativeRidge": RelativeRidge, "AbsoluteRidge": AbsoluteRidge}
_KEYS = {name: model.model_fields for name, model in _MODELS.items()}
"""Fields of what pydantic names so: of all, of a section, of a kind of ridge."""


def _nearest(word: str, known: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.5)), None)
