"""Whether a repair was worth it: where a result is no better than the plain cut, and what then."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghost_dist.report import text

HELD_OUT = "held-out calibration windows"
_APART = 2.0  # times the KL of another source


def no_better_than_cut(
    candidates: Sequence[Mapping[str, Any]], perplexity: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Where a repair that was asked for does not help: ``on``, ``measure``, and its two values."""
    chosen: Mapping[str, Any] = next((row for row in candidates if row["chosen"]), {})
    if len(candidates) == 1 and chosen["operator"] == "none":
        return []
    cut = next((row.get("kl") for row in candidates if row["operator"] == "none"), None)
    kl = chosen.get("kl")
    found = []
    if cut is not None and kl is not None and kl >= cut:
        found.append({"on": HELD_OUT, "measure": "kl", "pruned": cut, "recovered": kl})
    found += [
        {"on": corpus, "measure": "perplexity", **{k: of[k] for k in ("pruned", "recovered")}}
        for corpus, of in perplexity.items()
        if not of["recovered"] < of["pruned"]
    ]
    return found


def sentences(found: Sequence[Mapping[str, Any]], operator: str | None) -> list[str]:
    """What :func:`no_better_than_cut` found, in words."""
    if found and operator == "none":
        return [f"No operator is better than the plain cut on {HELD_OUT}: the plain cut was taken."]
    written = {"kl": lambda value: f"{value:.3f}", "perplexity": text.perplexity}
    return [
        f"The repair does not help: on {one['on']} the recovered model has a {one['measure']} of "
        f"{written[one['measure']](one['recovered'])}, the plain cut "
        f"{written[one['measure']](one['pruned'])}."
        for one in found
    ]


def sources_apart(candidates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where one source that was left out is recovered much worse than another."""
    chosen: Mapping[str, Any] = next((row for row in candidates if row["chosen"]), {})
    left_out = [one for one in chosen.get("left_out", ()) if one["kl"] is not None]
    ordered = sorted(left_out, key=lambda one: one["kl"])
    if not ordered or ordered[-1]["kl"] <= _APART * ordered[0]["kl"]:
        return []
    least, most = ordered[0], ordered[-1]
    said = (
        f"The recovered model is much further from the dense one on {most['source']} (KL "
        f"{most['kl']:.3f}) than on {least['source']} ({least['kl']:.3f}), each left out of the "
        "fit. If text like the former matters, give it a larger share of calibration.sources."
    )
    return [said]


def remedies(config: Mapping[str, Any], run: Path, *, helps: bool) -> list[tuple[str, str]]:
    """What to change, most promising first, and the command that does."""
    calibration, selection = config["calibration"], config["selection"]
    again = f"ghost-dist recover {shlex.quote(str(run / 'config.yaml'))} --out NEW "
    found = []
    if calibration["sampling"] == "beginning":
        found.append(("text from all over the source", "--set calibration.sampling=spread"))
    windows = 4 * calibration["windows"]
    found.append(("more calibration text", f"--set calibration.windows={windows}"))
    found.append(("other text, of the kind in use", "--set calibration.source=FILE"))
    layers = selection["remove"]
    if isinstance(layers, int) and layers > 1 and not selection["spans"]:
        found.append(("fewer layers", f"--remove {(3 * layers) // 4}"))
    if config["operator"]["name"] not in ("none", "fold"):
        found.append(("a repair without new parameters", "--operator fold"))
    if not helps:
        found.append(("no repair, a plain checkpoint", "--operator none"))
    return [(what, again + arguments) for what, arguments in found]
