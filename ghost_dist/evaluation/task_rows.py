"""Results of harness tasks as rows of text, the same in terminal, page and model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

VARIANTS = ("dense", "pruned", "recovered")
_AVERAGED = "acc"  # what the paper averages over its nine tasks


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
