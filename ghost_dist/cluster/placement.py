"""How many replicas fit on the nodes of a cluster, and whether a lost one is replaced; no Ray.

Ray only waits when a placement group does not fit; here it is known in advance and said with
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ghost_dist.engine_config import ClusterConfig
from ghost_dist.errors import ConfigError

Failure = Literal["crash", "hang", "preemption"]


@dataclass(frozen=True)
class Node:
    """A living node: its name, and the CPUs and GPUs that Ray may give away there."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Shape:
    ranks: int
    cpus_per_rank: int
    gpus_per_rank: int  # 0 or 1
    setting: str = "engine.tensor_parallel"  # the field that says how many ranks, for messages

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one rank, in Ray's names."""
        needs = {"CPU": self.cpus_per_rank, "GPU": self.gpus_per_rank}
        return {name: float(amount) for name, amount in needs.items() if amount}

    def ranks_on(self, node: Node) -> int:
        rooms = [node.cpus // self.cpus_per_rank]
        if self.gpus_per_rank:
            rooms.append(node.gpus // self.gpus_per_rank)
        return int(min(rooms))


def num_fitting(nodes: Sequence[Node], shape: Shape) -> int:
    on_one = sum(shape.ranks_on(node) // shape.ranks for node in nodes)
    if on_one:
        return on_one
    return sum(shape.ranks_on(node) for node in nodes) // shape.ranks


def strategy(nodes: Sequence[Node], shape: Shape) -> str:
    """STRICT_PACK, all ranks on one node, wherever one node is large enough; else PACK."""
    fits_one = any(shape.ranks_on(node) >= shape.ranks for node in nodes)
    return "STRICT_PACK" if fits_one else "PACK"


def check_room(nodes: Sequence[Node], shape: Shape, replicas: int) -> None:
    """Refuse what the cluster has no room for, with what each node has and what to change."""
    fitting = num_fitting(nodes, shape)
    if fitting >= replicas:
        return
    kind = "GPU" if shape.gpus_per_rank else "CPU"
    each = shape.gpus_per_rank or shape.cpus_per_rank
    found = ", ".join(f"{node.name}: {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in nodes)
    advice = (
        f"Set engine.replicas={fitting} or auto"
        if fitting
        else f"Lower {shape.setting}" + ("" if shape.gpus_per_rank else " or cpus_per_rank")
    )
    raise ConfigError(
        f"engine.replicas={replicas} x {shape.setting}={shape.ranks} ranks of {each} "
        f"{kind}{'s' if each > 1 else ''} need {replicas * shape.ranks * each} {kind}s"
        f"{' with ' + str(shape.cpus_per_rank) + ' CPUs each' if shape.gpus_per_rank else ''}, "
        f"but the cluster has room for {fitting} such replicas ({found}). {advice}, or add nodes."
    )


def may_go_on(failures: Mapping[Failure, int], config: ClusterConfig) -> bool:
    """Whether to replace a lost replica; ``failures``: since the last progress, with this one.

    So a run on machines that are taken away every few minutes goes on as long as it gets anywhere.
    """
    most = math.inf if config.max_preemptions is None else config.max_preemptions
    return (
        failures.get("crash", 0) <= config.max_crashes
        and failures.get("hang", 0) <= config.max_hangs
        and failures.get("preemption", 0) <= most
    )
