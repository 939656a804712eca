"""The model card: ``README.md`` of the exported checkpoint, with the Hub's metadata.

The source's own card is not copied, since it speaks of the uncut model; its licence and languages
are carried over, because they hold for what is made from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ghost_dist import __version__
from ghost_dist.calibration.corpora import ALIASES
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.repair import Repair, acting
from ghost_dist.config import Config
from ghost_dist.evaluation.task_rows import shots_and_examples, task_rows
from ghost_dist.spans import Span

CARD = "README.md"
PAPER = "2605.15491"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = "models--"
_CARRIED = ("license", "license_name", "license_link", "language")
_LICENCES = {"Apache License": "apache-2.0", "MIT License": "mit"}
_VARIANTS = ("dense", "pruned", "recovered")


def model_card(
    source: Checkpoint,
    config: Config,
    spans: Sequence[Span],
    operators: Mapping[Span, Repair],
    result: Mapping[str, Any] | None = None,
) -> str:
    """Markdown with YAML front matter.

    Parameters
    ----------
    source
        The original checkpoint; its card and licence file are read.
    config
        Of the run.
    spans, operators
        What was removed and what was put there.
    result
        Content of ``result.json``; None: the figures are not known yet.
    """
    base = _base_model(source, config)
    metadata = _metadata(source, config, base, bool(acting(operators)))
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    name = base or _folder_name(source, config)
    parts = [
        f"---\n{front}---",
        f"# {name.rpartition('/')[2]}, {sum(map(len, spans))} layers removed and recovered",
        _what(name, spans, operators, result),
        _figures(result),
        _tasks(result),
        _loading(bool(acting(operators))),
        _how(config, result),
        _limits(config, base, metadata),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(
    source: Checkpoint, config: Config, base: str | None, has_code: bool
) -> dict[str, Any]:
    card = _front_matter(source.path / CARD)
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base is not None:
        metadata["base_model"] = base
    metadata |= {key: card[key] for key in _CARRIED if key in card}
    if "license" not in metadata:
        metadata |= _licence_of_file(source.path)
    dataset = _dataset(config.calibration.source)
    if dataset is not None:
        metadata["datasets"] = [dataset]
    tags = ["ghost-dist", "pruned", "depth-pruning", "layer-pruning", f"arxiv:{PAPER}"]
    metadata["tags"] = [*tags, "custom_code"] if has_code else tags
    return metadata


def _what(
    name: str,
    spans: Sequence[Span],
    operators: Mapping[Span, Repair],
    result: Mapping[str, Any] | None,
) -> str:
    removed = ", ".join(f"`[{span.start}, {span.stop})`" for span in spans)
    text = (
        f"This is {name} without its decoder layers {removed} (half open, counted from 0), made "
        f"with ghost_dist {__version__} after [Ghosted Layers](https://arxiv.org/abs/{PAPER})."
    )
    present = acting(operators)
    refitted = [s.start - 1 for s in spans if s in operators and operators[s].down_FC is not None]
    if present:
        text += " A linear operator for each gap, solved in closed form, carries the stream across."
    if refitted:
        layers = ", ".join(map(str, refitted))
        text += f" The down_proj of layer {layers} of the original was refitted."
    if not present and not refitted:
        text += " Nothing was put in their place: it is the plain cut."
    if result is not None:
        before, after = result["parameters"]["before"], result["parameters"]["after"]
        text += f" Parameters: {before:,} before, {after:,} now ({after / before - 1:+.1%})."
    return text


def _figures(result: Mapping[str, Any] | None) -> str:
    if result is None or not result["perplexity"]:
        return ""
    lines = [
        "## Perplexity",
        "",
        "| text | original | cut, not repaired | this model |",
        "|---|---|---|---|",
    ]
    for corpus, value in result["perplexity"].items():
        cells = [_perplexity(value[variant]) for variant in _VARIANTS]
        lines.append(f"| {_cell(corpus)} | " + " | ".join(cells) + " |")
    worse = [_cell(str(one["on"])) for one in result["no_better_than_cut"]]
    if worse:
        lines += ["", f"**No better than the plain cut on: {', '.join(worse)}.**"]
    lines += [
        "",
        (
            "Against the original: KL divergence of the next-token distribution, nats per token, "
            "and the share of positions with the same likeliest token."
        ),
        "",
        "| text | KL, cut | KL, this model | same token, cut | same token, this model |",
        "|---|---|---|---|---|",
    ]
    for corpus, of_corpus in result["agreement"].items():
        found = [of_corpus[variant] for variant in _VARIANTS[1:]]
        cells = [f"{one['kl']:.3f}" for one in found] + [f"{one['top1']:.1%}" for one in found]
        lines.append(f"| {_cell(corpus)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _tasks(result: Mapping[str, Any] | None) -> str:
    if result is None or not result["tasks"]:
        return ""
    lines = [
        "## Tasks",
        (
            "By [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness); "
            f"{shots_and_examples(result['tasks'])}."
        ),
        "",
        "| task | metric | original | cut, not repaired | this model |",
        "|---|---|---|---|---|",
    ]
    for name, metric, cells in task_rows(result["tasks"]):
        lines.append(f"| {_cell(name)} | {_cell(metric)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _loading(has_code: bool) -> str:
    argument = ", trust_remote_code=True" if has_code else ""
    why = (
        "The argument lets transformers run the one small file `modeling_ghost_*.py` of this "
        "folder, which adds the operators; ghost_dist need not be installed."
        if has_code
        else "It is a plain checkpoint of its family; ghost_dist need not be installed."
    )
    return f"""## Use
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID"{argument})
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID"{argument})
tokens = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(tokens[0]))
```
{why}"""


def _how(config: Config, result: Mapping[str, Any] | None) -> str:
    calibration = config.calibration
    tokens = calibration.windows * calibration.window_length
    text = f"Calibration: {tokens:,} tokens of {_source_name(calibration.source)}"
    text += f" ({calibration.windows} windows of {calibration.window_length})."
    if config.selection.spans is not None:
        text += " The layers were given by hand."
    else:
        text += f" The layers were chosen by the criterion `{config.selection.criterion}`."
    if result is not None:
        text += f" Operator: `{result['operator']}`."
        for fit in result["fit"]:
            start, stop = fit["span"]
            text += (
                f" `[{start}, {stop})`: held-out residual {fit['residual']:.3f} of the plain "
                f"cut's, R2 {fit['r2']:.3f}."
            )
        refined = result["refine"]
        if refined is not None and refined["improved"]:
            text += " The operators were then trained against the original model."
        text += " All figures and versions: `result.json`; the configuration: `config.yaml`."
    return f"## How it was made\n{text}"


def _limits(config: Config, base: str | None, metadata: Mapping[str, Any]) -> str:
    fitted = (
        "- The operator was fitted to the calibration text; on other kinds of text or languages "
        "the repair may be worth less. Perplexity does not say how well it does your task: try it."
    )
    untested = (
        "- It was not aligned or safety-tested again after the cut; whatever holds for the "
        "original holds here at best."
    )
    lines = [fitted, untested]
    if config.refine.steps == 0:
        lines.append("- Nothing was trained; a short fine-tuning may give more back.")
    if "license" not in metadata:
        lines.append(
            "- The original came without a licence that could be read here. Its licence applies."
        )
    else:
        lines.append("- The licence of the original applies.")
    if base is None:
        lines.append("- The original was a local folder; add `base_model` before you publish this.")
    return "## Limits\n" + "\n".join(lines)


def _base_model(source: Checkpoint, config: Config) -> str | None:
    """The original's hub id, if one is known."""
    name = config.model.path
    if _HUB_ID.fullmatch(name) and not Path(name).expanduser().exists():
        return name
    for part in source.path.resolve().parts:  # a folder of the hub's cache says whose it is
        if part.startswith(_CACHED) and part.count("--") == 2:
            return part.removeprefix(_CACHED).replace("--", "/")
    return None


def _folder_name(source: Checkpoint, config: Config) -> str:
    """A name without the machine's path."""
    return Path(config.model.path).expanduser().resolve().name or source.path.name


def _source_name(source: str) -> str:
    """The calibration text without the machine's path."""
    dataset = _dataset(source)
    return f"`{dataset}`" if dataset is not None else f"the local `{Path(source).name}`"


def _dataset(source: str) -> str | None:
    """Hub id of a calibration source, None if it is local."""
    first = source.partition(":")[0]
    name = ALIASES.get(first, first).partition(":")[0]
    if _HUB_ID.fullmatch(name) and not Path(name).expanduser().exists():
        return name
    return None


def _front_matter(path: Path) -> dict[str, Any]:
    """Metadata of a card; empty if there are none, or none that can be read."""
    try:
        content = path.read_text(encoding="utf-8")
        _, front, _ = re.split(r"^---\s*$", content, maxsplit=2, flags=re.MULTILINE)
        found = yaml.safe_load(front) if content.startswith("---") else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _licence_of_file(folder: Path) -> dict[str, Any]:
    """What a licence file says, by its first lines; ``other`` where they are not known."""
    for path in sorted(folder.glob("LICENSE*")):
        beginning = path.read_text(encoding="utf-8", errors="replace")[:400]
        for words, name in _LICENCES.items():
            if words in beginning:
                return {"license": name}
        return {"license": "other", "license_name": path.name, "license_link": path.name}
    return {}


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
