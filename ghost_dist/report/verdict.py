"""Whether a repair was worth it, what to know before trusting its figures, and what to try then."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghost_dist.evaluation.task_rows import broken
from ghost_dist.report import text
from ghost_dist.report.record import RunRecord
from ghost_dist.run_folder import recover_command
from ghost_dist.solver.least_squares import FEW_TOKENS_PER_REGRESSOR, more_windows

FEW_WINDOWS, LARGE_CONDITION = 8, 1e12
HELD_OUT = "held-out calibration windows"
_APART = 2.0  # times the KL of another source
_STEPS = 100  # of distillation, as it was measured (docs/choices.md)


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


def remedies(
    config: Mapping[str, Any], run: Path, fits: Sequence[Mapping[str, Any]], *, helps: bool
) -> list[tuple[str, str]]:
    """What to change, most promising first, and the command that does."""
    calibration, selection = config["calibration"], config["selection"]
    again = f"{recover_command(run)} --out NEW "
    found = []
    if calibration["sampling"] == "beginning":
        found.append(("text from all over the source", "--set calibration.sampling=spread"))
    fewest = min((fit["tokens_per_channel"] for fit in fits), default=1.0)
    windows = more_windows(calibration["windows"], fewest)
    found.append(("more calibration text", f"--set calibration.windows={windows}"))
    found.append(("other text, of the kind in use", "--set calibration.source=FILE"))
    removed = sum(stop - start for start, stop in (fit["span"] for fit in fits))
    removed = removed or selection["remove"]
    if isinstance(removed, int) and removed > 1 and not selection.get("sublayers"):
        fewer = (3 * removed) // 4
        found.append((f"{fewer} removed layers instead of {removed}", f"--remove {fewer}"))
    trained = config["refine"]["steps"] or selection.get("sublayers")  # or could not be
    if config["operator"]["name"] != "none" and not trained:
        what = f"{_STEPS} steps of training the operators (distillation)"
        found.append((what, f"--set refine.steps={_STEPS}"))
    if config["operator"]["name"] not in ("none", "fold"):
        found.append(("a repair without new parameters", "--operator fold"))
    if not helps:
        found.append(("no repair, a plain checkpoint", "--operator none"))
    return [(what, again + arguments) for what, arguments in found]


def remarks(run: RunRecord) -> list[str]:
    """Warnings of the run itself, then what its figures show; each a sentence or two."""
    no_better = no_better_than_cut(run.candidates, run.perplexity)
    said = sentences(no_better, run.operator)
    if lost := broken(run.generation, run.probes):
        advised = remedies(run.config, run.path, run.fits, helps=True)
        gentler = [one for one in advised if "--remove" in one[1] or "refine.steps" in one[1]]
        ways = [f"{what}: {command}" for what, command in gentler]
        said.append(" ".join(lost) + f" Try {'; or '.join(ways)}" * bool(ways))
    said += [*sources_apart(run.candidates), *run.warnings]
    if run.missing:
        said.append(
            f"The run is not finished: {text.join_words(run.missing)} still to do. The same "
            "command continues it."
        )
    if run.stale:
        said.append(
            f"{text.join_words(run.stale).capitalize()} was done again after this result was "
            "written; what follows is the older result. Run recover to bring it up to date."
        )
    return list(dict.fromkeys([*said, *_perplexities(run), *_fits(run)]))


def _perplexities(run: RunRecord) -> list[str]:
    found = []
    if run.result is not None and not run.perplexity and not run.tasks:
        found.append(
            "Perplexity was not measured, so nothing here says what the model is worth. Name a "
            "text: ghost-dist evaluate RUN --set 'evaluation.corpora={name: FILE}'."
        )
    for corpus, value in run.perplexity.items():
        windows = run.num_windows(corpus)
        if windows is None:
            found.append(f"{corpus}: nats of each window were not recorded, so no interval.")
        elif windows < FEW_WINDOWS:
            found.append(
                f"{corpus}: only {windows} evaluated window{'s' if windows > 1 else ''}; "
                + ("there is no interval." if windows == 1 else "its interval is a rough guess.")
                + " Raise evaluation.windows."
            )
        helps = value["recovered"] < value["pruned"] and run.operator != "none"
        _, between = run.gap_closed(corpus) or (0.0, None)
        if helps and between is not None and between[0] <= 0:
            found.append(
                f"{corpus}: on other windows of this text the repair might not have helped; the "
                "interval of the share of the gap closed reaches 0."
            )
        if not all(math.isfinite(v) for v in value.values()):
            found.append(f"{corpus}: a perplexity is beyond what can be written as a number.")
    return found


def _fits(run: RunRecord) -> list[str]:
    found = []
    for fit in run.fits:
        span = text.span(fit["span"])
        if fit["tokens_per_channel"] < FEW_TOKENS_PER_REGRESSOR:
            found.append(
                f"{span}: {fit['tokens_per_channel']:.1f} calibration tokens for each regressor; "
                "below 4 the fit is uncertain. Raise calibration.windows."
            )
        if fit["residual"] >= 1:
            found.append(
                f"{span}: on windows it was not fitted on, the operator is no better than the "
                f"plain cut (held-out residual {fit['residual']:.3f})."
            )
        curve = sorted(fit["ridge_curve"])
        if len(curve) > 2 and min(curve, key=lambda point: point[1]) in (curve[0], curve[-1]):
            found.append(
                f"{span}: the held-out residual is least at the end of the ridges tried, so a "
                "better one may lie outside."
            )
        if fit["condition"] > LARGE_CONDITION:
            found.append(
                f"{span}: the condition number of the least squares is "
                f"{text.number(fit['condition'], 2)}; of float64's 16 digits few are left. Give a "
                "larger ridge."
            )
    return found
