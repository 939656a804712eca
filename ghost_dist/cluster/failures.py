"""What is known of a replica that was lost: states, stacks and logs of its ranks, in a file of RUN.

Ray removes the logs when the cluster goes, and a rank is killed when its replica is given up, so
both are looked at before. Each rank's process has a handler that writes the stacks of all of its
threads to its log, even where one of them holds the interpreter (``faulthandler``).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ghost_dist.durable import write_bytes

if TYPE_CHECKING:  # a process that looks starts without torch
    from ghost_dist.cluster.rank import Place

_LINES, _RAYLET_LINES, _EVENTS = 200, 20, 20
_STACKS_S = 1.0  # that a process has to write its stacks
_ANSWER_S = 20.0  # that another node has to answer; a new process starts there


def keep_failure(run: Path, number: int, places: Iterable[Place], said: str) -> Path:
    """Write ``RUN/failures/TIME-replica-NUMBER.txt`` before the ranks are killed."""
    remote = ray.remote(num_cpus=0, max_retries=0)(look_at)
    parts, elsewhere = [said, *_tail(run / "events.jsonl", _EVENTS)], {}
    for rank, place in enumerate(places):
        title = f"\n=== rank {rank}, process {place.pid} on {place.node} ({place.address})"
        if _is_here(place):
            parts += [title, look_at(place.pid, place.log)]
        else:
            there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
            ref = remote.options(scheduling_strategy=there).remote(place.pid, place.log)
            elsewhere[ref] = title
    done, _ = ray.wait(list(elsewhere), num_returns=len(elsewhere), timeout=_ANSWER_S)
    for ref, title in elsewhere.items():
        found = f"the node has not answered within {_ANSWER_S:g} s"
        if ref in done:
            try:
                found = ray.get(ref)
            except ray.exceptions.RayError as error:
                found = f"the node cannot be asked: {type(error).__name__}"
        parts += [title, found]
    name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-replica-{number}.txt"
    path = run / "failures" / name
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, "\n".join(parts).encode() + b"\n")
    return path


def _is_here(place: Place) -> bool:
    return place.address == ray.util.get_node_ip_address() and Path(place.log).exists()


def look_at(pid: int, log: str) -> str:
    """State of a process of this node, its stacks if it can write them, and the ends of its log and
    the raylet's."""
    path = Path(log)
    found = [f"state: {_state(pid)}"]
    with contextlib.suppress(OSError):  # it is gone, or is another's by now
        if os.readlink(f"/proc/{pid}/fd/2") == log:
            os.kill(pid, signal.SIGUSR1)
            time.sleep(_STACKS_S)
    found += [f"--- end of {path}", *_tail(path, _LINES)]
    raylet = path.with_name("raylet.out")
    return "\n".join([*found, f"--- end of {raylet}", *_tail(raylet, _RAYLET_LINES)])


def _state(pid: int) -> str:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "there is no such process any more"
    [line] = [line for line in status.splitlines() if line.startswith("State:")]
    return line.partition(":")[2].strip()


def _tail(path: Path, lines: int) -> list[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, lines)]
    except OSError as error:
        return [f"cannot be read: {error}"]
