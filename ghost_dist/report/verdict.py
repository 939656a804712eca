"""Whether a repair was worth it: where a result is no better than the plain cut, and what then."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghost_dist.report import text

HELD_OUT = "held-out calibration windows"


def no_better_than_cut(
    candidates: Sequence[Mapping[str, Any]], perplexity: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Where a repair that was asked for does not help.

    Parameters
    ----------
    candidates
        What was tried, as in ``result.json``; the plain cut is judged where it is among several.
    perplexity
        Corpus to variant to perplexity.

    Returns
    -------
    list of dict
        ``on`` (a corpus, or :data:`HELD_OUT`), ``measure`` (``kl`` or ``perplexity``), ``pruned``
        and ``recovered``. Empty where the repair helps everywhere, and where none was asked for.
    """
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


def remedies(config: Mapping[str, Any], run: Path) -> list[tuple[str, str]]:
    """What to change, most promising first, and the command that does.

    Parameters
    ----------
    config
        The run's configuration as plain values.
    run
        The RUN folder, whose ``config.yaml`` the commands start from.
    """
    calibration, selection = config["calibration"], config["selection"]
    again = f"ghost-dist recover {shlex.quote(str(run / 'config.yaml'))} --out NEW "
    found = [
        (
            "more calibration text",
            again + f"--set calibration.windows={4 * calibration['windows']}",
        ),
        ("other text, of the kind in use", again + "--set calibration.source=FILE"),
    ]
    if calibration["sampling"] == "beginning":
        found.insert(
            0, ("text from all over the source", again + "--set calibration.sampling=spread")
        )
    layers = selection["remove"]
    if isinstance(layers, int) and layers > 1 and not selection["spans"]:
        found.append(("fewer layers", again + f"--remove {(3 * layers) // 4}"))
    if config["operator"]["name"] not in ("none", "fold"):
        found.append(("a repair without new parameters", again + "--operator fold"))
    found.append(("no repair, a plain checkpoint", again + "--operator none"))
    return found
