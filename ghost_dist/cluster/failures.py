"""What is known of a replica that was lost: states, stacks and logs of its ranks, in a file of RUN.

Ray removes the logs when the cluster goes, and a rank is killed when its replica is given up, so
both are looked at before. Each rank's process has a handler that writes the stacks of all of its
threads to its log, even where one of them holds the interpreter (``faulthandler``). One that is
stopped, or that the kernel holds, cannot: py-spy reads its memory, where it is installed. What the
ranks wait for of each other is in torch's flight recorder, of those that still answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ghost_dist.durable import write_bytes

if TYPE_CHECKING:  # a process that looks starts without torch
    from ghost_dist.cluster.rank import Place
    from ghost_dist.cluster.replica import Replica

_LINES, _RAYLET_LINES, _EVENTS, _COLLECTIVES = 200, 40, 20, 10
_NOISE = ("[state-dump]", "- ", "\n")  # statistics that a raylet writes every minute
_STACKS_S = 1.0  # that a process has to write its stacks
_PY_SPY_S = 5.0
_ANSWER_S = 20.0  # that another node has to answer; a new process starts there


def keep_failure(run: Path, replica: Replica, said: str) -> Path:
    """Write ``RUN/failures/TIME-replica-NUMBER.txt`` before the ranks are killed.

    Dumps of flight recorders are written beside it as ``TIME-replica-NUMBER-rank-RANK``.
    """
    recorded = replica.collectives()
    name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-replica-{replica.number}"
    path = run / "failures" / f"{name}.txt"
    path.parent.mkdir(exist_ok=True)
    remote = ray.remote(num_cpus=0, max_retries=0)(look_at)
    parts, elsewhere = [said, "\n--- last events", *_last_events(run)], {}
    for rank, node_id in enumerate(replica.node_ids):
        place = replica.places[rank] if replica.places else None
        title = f"\n=== rank {rank}, on node {node_id}, has not started"
        if place is not None:
            title = f"\n=== rank {rank}, process {place.pid} on {place.node} ({place.address})"
        of_rank = (place.pid, place.log) if place is not None else ()
        if place is not None and _is_here(place):
            parts += [title, look_at(time.time(), *of_rank)]
        else:
            there = NodeAffinitySchedulingStrategy(node_id, soft=False)
            ref = remote.options(scheduling_strategy=there).remote(time.time(), *of_rank)
            elsewhere[ref] = title
    done, _ = ray.wait(list(elsewhere), num_returns=len(elsewhere), timeout=_ANSWER_S)
    for ref, title in elsewhere.items():
        found = f"the node has not answered within {_ANSWER_S:g} s"
        if ref in done:
            try:
                found = ray.get(ref)
            except ray.exceptions.RayError as error:
                found = (
                    f"the node cannot be asked ({type(error).__name__}): it is gone, or no process "
                    "can start there, for a full disk or memory"
                )
        parts += [title, found]
    for rank, dump in sorted(recorded.items()):
        if lines := _last_collectives(dump):
            write_bytes(path.with_name(f"{name}-rank-{rank}"), dump)
            parts += [f"\n--- last collectives of rank {rank}", *lines]
    write_bytes(path, "\n".join(parts).encode() + b"\n")
    return path


def _is_here(place: Place) -> bool:
    return place.address == ray.util.get_node_ip_address() and Path(place.log).exists()


def look_at(asked: float, pid: int | None = None, log: str | None = None) -> str:
    """Clock and disk of this node, and the end of its raylet's log; of a process of it the state,
    the stacks if it can write them, and the end of its log. ``asked``: when, by the driver's clock.
    """
    logs = Path(log or os.path.realpath("/proc/self/fd/2")).parent  # where Ray has all of the node
    disk, behind = shutil.disk_usage(logs), time.time() - asked
    found = [
        f"clock: {behind:+.1f} s from the driver's when it asked",
        f"disk of {logs}: {disk.free / 1e9:.2f} of {disk.total / 1e9:.2f} GB free",
    ]
    if pid is not None and log is not None:
        state = _state(pid)
        found += [f"state: {state}"]
        if state[0] in "TD":
            found += [_read_stacks(pid)]
        with contextlib.suppress(OSError):  # it is gone, or is another's by now
            if os.readlink(f"/proc/{pid}/fd/2") == log:
                os.kill(pid, signal.SIGUSR1)
                time.sleep(_STACKS_S)
        found += [f"--- end of {log}", *_tail(Path(log), _LINES)]
    raylet = logs / "raylet.out"
    return "\n".join([*found, f"--- end of {raylet}", *_tail(raylet, _RAYLET_LINES, _NOISE)])


def _last_events(run: Path) -> list[str]:
    """As a person reads them: time of day (UTC), event, fields."""
    lines = []
    for line in _tail(run / "events.jsonl", _EVENTS):
        with contextlib.suppress(ValueError):  # a line that was cut off
            event = json.loads(line)
            at = time.strftime("%H:%M:%S", time.gmtime(event.pop("time")))
            fields = " ".join(f"{name}={value}" for name, value in event.items() if name != "event")
            lines.append(f"{at} {event['event']} {fields}")
    return lines


def _last_collectives(dump: bytes) -> list[str]:
    """Where the ranks differ, or the one that is not over, is where they wait for each other."""
    try:
        return [_as_line(entry) for entry in pickle.loads(dump)["entries"][-_COLLECTIVES:]]
    except (LookupError, TypeError) as error:  # its form is torch's own
        return [f"cannot be read: {error!r}"]


def _as_line(entry: dict[str, Any]) -> str:
    at = time.strftime("%H:%M:%S", time.gmtime(entry["time_created_ns"] / 1e9))
    what = f"{entry['profiling_name']} {entry['input_dtypes']} {entry['input_sizes']}"
    number, group = entry["collective_seq_id"], entry["process_group"][0]
    state = f"{entry['state']}, {'over' if entry['retired'] else 'not over'}"
    ours = (f for f in entry.get("frames", ()) if "/torch/distributed/" not in f["filename"])
    where = next((f"{f['name']}, {f['filename']}:{f['line']}" for f in ours), "?")
    return f"{at} {what}, number {number} of group {group}: {state}; in {where}"


def _state(pid: int) -> str:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "there is no such process any more"
    [line] = [line for line in status.splitlines() if line.startswith("State:")]
    state = line.partition(":")[2].strip()
    with contextlib.suppress(OSError):  # what the kernel waits for, where it tells
        waits = Path(f"/proc/{pid}/wchan").read_text()
        state += f", in the kernel's {waits}" if waits.strip("0") else ""
    return state


def _read_stacks(pid: int) -> str:
    places = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    py_spy = shutil.which("py-spy", path=places)
    if py_spy is None:
        return "its stacks could be read by py-spy, which is not installed here"
    command = [py_spy, "dump", "--nonblocking", "--pid", str(pid)]  # it would stop it with ptrace
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_PY_SPY_S
        )
    except subprocess.TimeoutExpired:
        return f"py-spy has not read its stacks within {_PY_SPY_S:g} s"
    return f"--- py-spy\n{done.stdout}{done.stderr.partition('Stack backtrace')[0]}".rstrip()


def _tail(path: Path, lines: int, without: tuple[str, ...] = ()) -> list[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            kept = (line for line in file if not line.startswith(without))
            return [line.rstrip("\n") for line in deque(kept, lines)]
    except OSError as error:
        return [f"cannot be read: {error}"]
