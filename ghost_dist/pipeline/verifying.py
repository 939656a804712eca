"""``ghost-dist verify``: whether a RUN holds what its records say; writes nothing."""

import shlex
from pathlib import Path
from typing import NamedTuple

from ghost_dist.errors import CorruptStoreError
from ghost_dist.export.operator_files import load_operator
from ghost_dist.pipeline.exporting import file_sizes
from ghost_dist.report.record import RunRecord
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.store_plan import plan_path


class Verified(NamedTuple):
    """What was found, in words, and whether anything is damaged."""

    lines: list[str]
    damaged: bool


def verify_run(run: Path) -> Verified:
    """Check hashes of statistics and operators, files of the checkpoint, what is out of date.

    RunFolderError if it is no RUN folder.
    """
    record = RunRecord(run)
    lines, damaged, missing = _statistics(run)
    operators = record.operator_files
    broken = []
    for span, (path, sha256) in operators.items():
        try:
            load_operator(path, sha256)
        except CorruptStoreError as error:
            broken.append(f"operator {span}: DAMAGED. {error}")
    if operators:
        sound = len(operators) - len(broken)
        lines += [*broken, f"{sound} of {len(operators)} operators are sound."]
    recorded, found = record.stages["export"].get("files", {}), file_sizes(run / "checkpoint")
    wrong = [name for name, nbytes in recorded.items() if found.get(name) != nbytes]
    lines += [f"checkpoint/{name}: DAMAGED. It is absent or has another size." for name in wrong]
    if recorded:
        good = len(recorded) - len(wrong)
        lines.append(f"{good} of {len(recorded)} files of the checkpoint are there as written.")
    bad = damaged or bool(broken) or bool(wrong)
    if bad or missing:
        again = shlex.join(["ghost-dist", "recover", str(run / "config.yaml"), "--out", str(run)])
        lines.append(f"To run just the others: {again}")
    return Verified([*lines, *record.out_of_date], bad)


def _statistics(run: Path) -> tuple[list[str], bool, bool]:
    """Words, whether ranges are damaged, whether some are missing."""
    if not plan_path(run / "statistics.zarr").exists():  # before it a store holds nothing
        return ["No statistics are there yet."], False, True
    try:
        store = StatisticsStore.open(run / "statistics.zarr")
    except CorruptStoreError as error:
        return [f"statistics: DAMAGED. {error}"], True, False
    damaged, missing = store.damaged(), store.missing()
    lines = [f"range {range_id}: DAMAGED. {reason}" for range_id, reason in damaged.items()]
    if missing:
        lines.append(f"not yet run: ranges {', '.join(map(str, missing))}")
    sound = len(store.committed()) - len(damaged)
    lines.append(f"{sound} of {len(store.plan.ranges)} ranges are sound.")
    return lines, bool(damaged), bool(missing)
