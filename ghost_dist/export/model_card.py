"""The model card: ``README.md`` of the exported checkpoint, with the Hub's metadata.

The source's own card is not copied, since it speaks of the uncut model; its licence and languages
are carried over, because they hold for what is made from it.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import metadata_load

from ghost_dist import __version__
from ghost_dist.calibration.corpora import ALIASES
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.config import Config
from ghost_dist.evaluation import task_rows

if TYPE_CHECKING:
    import jinja2

CARD = "README.md"
PAPER = "2605.15491"

_CACHED = "models--"
_CARRIED = ("license", "license_name", "license_link", "language")
_LICENCES = {"Apache License": "apache-2.0", "MIT License": "mit"}


def model_card(
    source: Checkpoint, config: Config, variant: Variant, result: Mapping[str, Any] | None = None
) -> str:
    """Markdown with YAML front matter; without figures where there is no ``result.json`` yet."""
    base, dataset = _base_model(source, config), _dataset(config.calibration.source)
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base is not None:
        metadata["base_model"] = base
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # there is no card to be read
        card = metadata_load(source.path / CARD) or {}
        metadata |= {key: card[key] for key in _CARRIED if key in card}
    if "license" not in metadata:
        metadata |= _licence_of_file(source.path)
    if dataset is not None:
        metadata["datasets"] = [dataset]
    refitted = [s.start - 1 for s, one in variant.operators.items() if one.down_FC is not None]
    tags = ["ghost-dist", "pruned", "depth-pruning", "layer-pruning", f"arxiv:{PAPER}"]
    metadata["tags"] = [*tags, "custom_code"] if variant.has_code else tags
    return _template().render(
        front=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        # Names without the machine's paths.
        name=base or Path(config.model.path).expanduser().resolve().name or source.path.name,
        text=f"`{dataset}`" if dataset else f"the local `{Path(config.calibration.source).name}`",
        variant=variant,
        config=config,
        refitted=refitted,
        repaired=bool(variant.at_boundary or refitted or variant.outputs),
        result=result,
        licensed="license" in metadata,
        base=base,
        paper=PAPER,
        version=__version__,
        task_rows=task_rows,
    )


@functools.cache
def _template() -> jinja2.Template:
    import jinja2

    cards = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    cards.filters["cell"] = lambda text: text.replace("|", r"\|").replace("\n", " ")
    cards.filters["perplexity"] = lambda x: f"{x:.2f}" if x < 1000 else f"{x:.4g}"
    return cards.get_template("model_card.md.j2")


def _base_model(source: Checkpoint, config: Config) -> str | None:
    """The original's hub id, if one is known."""
    if _is_hub_id(config.model.path):
        return config.model.path
    for part in source.path.resolve().parts:  # a folder of the hub's cache says whose it is
        if part.startswith(_CACHED) and part.count("--") == 2:
            return part.removeprefix(_CACHED).replace("--", "/")
    return None


def _dataset(source: str) -> str | None:
    """Hub id of a calibration source, None if it is local."""
    first = source.partition(":")[0]
    name = ALIASES.get(first, first).partition(":")[0]
    return name if _is_hub_id(name) else None


def _is_hub_id(name: str) -> bool:
    is_one = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    return is_one is not None and not Path(name).expanduser().exists()


def _licence_of_file(folder: Path) -> dict[str, Any]:
    """What a licence file says, by its first lines; ``other`` where they are not known."""
    for path in sorted(folder.glob("LICENSE*")):
        beginning = path.read_text(encoding="utf-8", errors="replace")[:400]
        for words, name in _LICENCES.items():
            if words in beginning:
                return {"license": name}
        return {"license": "other", "license_name": path.name, "license_link": path.name}
    return {}
