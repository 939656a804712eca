"""What a store of statistics counts, as it stands in its ledger."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghost_dist.amounts import shown
from ghost_dist.durable import fingerprint, read_sealed
from ghost_dist.errors import RunMismatchError

FORMAT = 6


@dataclass(frozen=True)
class StatisticsPlan:
    """What a store counts; two runs may share a store only if this is equal."""

    inputs: Mapping[str, Any]  # fingerprints and settings that decide the numbers
    entries: Mapping[str, str]  # name of each sum -> key of KINDS
    ranges: tuple[tuple[int, ...], ...]  # window ids of each; together every window once
    window_length: int  # tokens
    blocks: int = 1  # of columns, one for each rank of a replica

    def tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {"format": FORMAT, **tree}

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.tree())


def stored_plan(path: Path) -> StatisticsPlan | None:
    """What the store in a folder counts; None if there is none, or its plan is damaged."""
    tree = read_sealed(plan_path(path))
    if tree is None or tree.pop("format") != FORMAT:
        return None
    ranges = tuple(tuple(ids) for ids in tree.pop("ranges"))
    return StatisticsPlan(ranges=ranges, **tree)


def plan_path(path: Path) -> Path:
    return path / "ledger" / "plan.json"


def check_same_plan(path: Path, found: StatisticsPlan, wanted: StatisticsPlan) -> None:
    """Raise RunMismatchError, naming what differs, unless both count the same."""
    if found.fingerprint == wanted.fingerprint:
        return
    flat_found = {**found.tree(), **found.inputs}
    flat_wanted = {**wanted.tree(), **wanted.inputs}
    differing = [
        f"{key}: {shown(flat_found.get(key))} in the store, {shown(flat_wanted.get(key))} now"
        for key in dict.fromkeys((*flat_wanted, *flat_found))
        if key != "inputs" and flat_found.get(key) != flat_wanted.get(key)
    ]
    raise RunMismatchError(
        f"The statistics in {path} are of other inputs:\n  "
        + "\n  ".join(differing)
        + "\nUse another output.path, or remove that folder to start over."
    )
