"""What to do when a replica is lost: a pure function of what was lost since the last progress.

Budgets count from the last committed range. A run on machines that are taken away every few minutes
goes on as long as it gets anywhere; one that fails at the same place each time stops soon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ghost_dist.config import ClusterConfig

Failure = Literal["crash", "hang", "preemption"]
Decision = Literal["rebuild", "stop"]


def decide(failures: Mapping[Failure, int], config: ClusterConfig) -> Decision:
    """Whether to build another replica; ``failures``: since the last progress, with this one."""
    budgets: dict[Failure, int | None] = {
        "crash": config.max_crashes,
        "hang": config.max_hangs,
        "preemption": config.max_preemptions,
    }
    spent = any(
        budget is not None and failures.get(kind, 0) > budget for kind, budget in budgets.items()
    )
    return "stop" if spent else "rebuild"
