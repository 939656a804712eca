"""Results of tasks, probes and generation in words, the same on terminal, page and model card."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

VARIANTS = ("dense", "pruned", "recovered")
_AVERAGED = "acc"  # what the paper averages over its nine tasks
_REPEATS_MORE = 0.2  # of the runs of tokens, than the dense model
ANSWERS = 0.4  # share of a probe below which a dense model fails, and the probe says nothing
_KEEPS = 0.5  # of what the dense model answers


def task_rows(tasks: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """A row per task and metric, and the mean accuracy where several tasks have one.

    ``tasks`` are those of ``result.json``; a row is (task, metric, values of the dense, the pruned
    and the recovered model), with standard errors where there are some.
    """
    rows = []
    for name, by_variant in tasks.items():
        for metric, first in by_variant["dense"]["metrics"].items():
            better = {"higher": " ↑", "lower": " ↓"}.get(first["better"], "")
            found = [by_variant[variant]["metrics"][metric] for variant in VARIANTS]
            cells = [_cell(one["value"], one["stderr"]) for one in found]
            rows.append((name, f"{metric}{better}", cells))
    found = [
        [of[variant]["metrics"].get(_AVERAGED, {}).get("value") for of in tasks.values()]
        for variant in VARIANTS
    ]
    accuracies = [[value for value in values if value is not None] for values in found]
    number = len(accuracies[0])
    if number > 1:
        means = [_cell(math.fsum(values) / number, None) for values in accuracies]
        rows.append((f"mean of {number} tasks", f"{_AVERAGED} ↑", means))
    return rows


def generation(found: Mapping[str, Any]) -> str:
    """What ``samples.generation`` measured, in two sentences."""
    same = {model: f"{found[model]['same']:.1f}" for model in ("pruned", "recovered")}
    again = {model: f"{found[model]['repeated']:.0%}" for model in VARIANTS}
    return (
        f"{found['prompts']} texts continued greedily by {found['tokens']} tokens: the first "
        f"{same['recovered']} on average are those of the dense model (pruned: {same['pruned']}). "
        f"Runs of 4 tokens that repeat: dense {again['dense']}, pruned {again['pruned']}, "
        f"recovered {again['recovered']}."
    )


def probe_rows(probes: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row per probe that says something: name, number of questions, what each model has right."""
    return [
        [name, str(of["questions"]), *(f"{of[variant]:.0%}" for variant in VARIANTS)]
        for name, of in probes.items()
        if of["dense"] >= ANSWERS
    ]


def unasked(probes: Mapping[str, Mapping[str, Any]], left_out: Sequence[str]) -> str:
    """Sentences on what was left out, and on the probes that say nothing; empty without any."""
    found = [f"{name} {of['dense']:.0%}" for name, of in probes.items() if of["dense"] < ANSWERS]
    said = "Probes that say nothing, since the dense model fails too: {} right."
    return " ".join([*left_out, *([said.format(", ".join(found))] if found else [])])


def broken(generation: Mapping[str, Any], probes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences on what the recovered model has lost, which perplexity does not show."""
    said = []
    if generation:
        again = {model: generation[model]["repeated"] for model in ("dense", "recovered")}
        if again["recovered"] > again["dense"] + _REPEATS_MORE:
            said.append(
                "The recovered model repeats itself where the dense one does not, whatever its "
                f"perplexity: {again['recovered']:.0%} of its runs of 4 tokens were there before "
                f"in the same text (dense: {again['dense']:.0%})."
            )
    lost = [
        f"{of['recovered']:.0%} of {name} (dense: {of['dense']:.0%})"
        for name, of in probes.items()
        if of["dense"] >= ANSWERS and of["recovered"] < _KEEPS * of["dense"]
    ]
    if lost:
        said.append(
            "The recovered model fails where the dense one does not, whatever its perplexity: of "
            f"the questions of the probes it answers right {', '.join(lost)}."
        )
    return said


def shots_and_examples(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """What the rows are of: ``0 examples in the prompt; 2376 documents``, with ranges."""
    shots = [row["dense"]["shots"] for row in tasks.values() if row["dense"]["shots"] is not None]
    counts = [row["dense"]["examples"] for row in tasks.values() if row["dense"]["examples"]]
    parts = [f"{_range(shots)} examples in the prompt"] if shots else []
    return "; ".join([*parts, *([f"{_range(counts)} documents a task"] if counts else [])])


def _cell(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "-"
    size = abs(value)
    text = format(value, ".3f" if size < 10 else ".2f" if size < 1e4 else ".3e")
    return text if stderr is None else f"{text} ± {stderr:.3f}"


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
