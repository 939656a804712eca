"""``events.jsonl`` of a run as a trace that Perfetto opens: who did what, when.

The driver is one process of the trace and every replica is one, with a track for each rank and one
for what it writes beside the next range. Begin and end are of the driver's clock, so hosts may have
others. ``forward`` and ``sums`` are as long as the rank measured; they alternate batch by batch,
but are shown one after the other. The rest, until the driver knew and gave more to do, is ``wait``.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ghost_dist.durable import write_bytes
from ghost_dist.report.record import RunRecord

Args = dict[str, Any]
Track = tuple[str, str]  # process and thread, as they are shown

_INSTANTS = ("run-start", "warning", "stage-failed", "replica-lost", "reduction-failed")


def write_trace(run: Path, out: Path) -> None:
    """Write the trace of a run, finished or not: JSON in the Trace Event Format."""
    write_bytes(out, json.dumps(trace_of(RunRecord(run).events)).encode())


def trace_of(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The trace of a run's events; times in microseconds since the first one."""
    trace = _Trace()
    for event in sorted(events, key=lambda event: event["time"]):
        trace.take(event)
    trace.end()
    return {"traceEvents": list(trace.entries()), "displayTimeUnit": "ms"}


class _Trace:
    """Spans and instants so far, which some events change."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float, Track, str, Args]] = []
        self._instants: list[tuple[float, str, Args]] = []
        self._busy: dict[Track, float] = {}  # the last span of a track ends there
        self._stages: dict[str, float] = {}
        self._doing: dict[Track, tuple[float, str, Args]] = {}
        self._unwritten: dict[Any, float] = {}  # since when a range is run
        self._ranks: dict[int | None, int] = {}
        self._now = 0.0

    def take(self, event: Args) -> None:
        now = event["time"]
        match event["event"]:
            case "run-start":
                self.end()  # one that was killed
                self._stages["run"] = now
            case "run-end":
                self._stage("run", now)
            case "stage-start":
                self._stages[event["stage"]] = now
            case "stage-end" | "stage-failed":
                self._stage(event["stage"], now)
            case "waited":
                # Both are rounded: what began with the run does not begin before it.
                began = max(now - event["seconds"], self._stages.get("run", -math.inf))
                self._stages[event["what"]] = began
                self._stage(event["what"], now)
            case "replica-start":
                self._ranks[event["replica"]] = event["ranks"]
                for track in self._tracks(event):
                    self._doing[track] = (now, "start", {})
            case "replica-ready":
                load_s = event.get("load_s", event["seconds"])  # not of older versions
                for rank, track in enumerate(self._tracks(event)):
                    self._done(track, now - load_s)
                    of_rank = {key: of[rank] for key, of in event.items() if isinstance(of, list)}
                    self._show(track, "load", now - load_s, now, of_rank)
            case "range-leased" | "span-leased":
                for track in self._tracks(event):
                    self._wait(track, now)
                    self._doing[track] = (now, "fit" if "span" in event else "range", event)
            case "range-ran":
                for rank, track in enumerate(self._tracks(event)):
                    forward_s, sums_s = event["forward_s"][rank], event["sums_s"][rank]
                    began = now - forward_s - sums_s
                    began, _, args = self._doing.pop(track, (began, "", event))
                    summed = min(began + forward_s, now)
                    self._show(track, "forward", began, summed, args)
                    self._show(track, "sums", summed, min(summed + sums_s, now), args)
                self._unwritten[_attempt(event)] = now
            case "range-committed" if (attempt := _attempt(event)) in self._unwritten:
                ran = self._unwritten.pop(attempt)
                for process, thread in self._tracks(event):
                    self._show((process, f"{thread} writes"), "write", ran, now, event)
            case "span-fitted":
                for track in self._tracks(event):
                    self._done(track, now, {"fits": event["fits"]})
            case "reduced":
                for replica in map(int, event["kept"]):
                    for track in self._tracks({"replica": replica}):
                        self._wait(track, now - event["seconds"])
                        self._show(track, "all-reduce", now - event["seconds"], now, {})
            case "replica-end":
                for track in self._tracks(event):
                    self._done(track, now, {"given_up": True})
                    self._wait(track, now)
        if event["event"] in _INSTANTS:
            self._instants.append((now, _process(event.get("replica")), event))
        self._now = now

    def end(self) -> None:
        """What is open ends with the last event, after which nothing was said."""
        for name in list(self._stages):
            self._stage(name, self._now, {"unfinished": True})
        for track in list(self._doing):
            self._done(track, self._now, {"unfinished": True})
        self._busy.clear()
        self._unwritten.clear()

    def entries(self) -> Iterator[Args]:
        """What the file lists: names of tracks, spans and instants."""
        spans = sorted(self._spans, key=lambda span: (span[0], -span[1]))
        first = min([start for start, *_ in spans] + [at for at, *_ in self._instants], default=0)
        pids: dict[str, int] = {}
        tids: dict[Track, int] = {}
        free: dict[Track, float] = {}

        def place(process: str, thread: str) -> Args:
            pid = pids.setdefault(process, len(pids) + 1)
            return {"pid": pid, "tid": tids.setdefault((process, thread), len(tids) + 1)}

        for start, stop, (process, thread), name, args in spans:
            # Stages that run at the same time are below one another.
            rows = (thread if n == 1 else f"{thread} {n}" for n in itertools.count(1))
            row = next(row for row in rows if free.get((process, row), start) <= start)
            free[process, row] = stop
            timed = {"ts": round((start - first) * 1e6), "dur": round((stop - start) * 1e6)}
            yield {"ph": "X", "name": name, **timed, **place(process, row), "args": args}
        for at, process, args in self._instants:
            when = {"ts": round((at - first) * 1e6), "s": "p"}
            thread = "run" if process == "driver" else "rank 0"
            yield {"ph": "i", "name": args["event"], **when, **place(process, thread), "args": args}
        for process, pid in pids.items():
            yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}}
        for (process, thread), tid in tids.items():
            where = {"pid": pids[process], "tid": tid}
            yield {"ph": "M", "name": "thread_name", **where, "args": {"name": thread}}

    def _tracks(self, event: Args) -> list[Track]:
        replica = event.get("replica")
        ranks = [event["rank"]] if "rank" in event else range(self._ranks.get(replica, 1))
        return [(_process(replica), f"rank {rank}") for rank in ranks]

    def _stage(self, name: str, now: float, args: Args | None = None) -> None:
        if name in self._stages:
            began = self._stages.pop(name)
            thread = "run" if name == "run" else "stages"
            self._spans.append((began, now, ("driver", thread), name, args or {}))

    def _done(self, track: Track, now: float, args: Args | None = None) -> None:
        if track in self._doing:
            began, name, of_lease = self._doing.pop(track)
            self._show(track, name, began, now, {**of_lease, **(args or {})})

    def _wait(self, track: Track, now: float) -> None:
        self._show(track, "wait", self._busy.get(track, now), now, {})

    def _show(self, track: Track, name: str, start: float, stop: float, args: Args) -> None:
        """A span behind the last one of its track: times are rounded, and could overlap."""
        start = max(start, self._busy.get(track, start))
        if stop > start:
            self._spans.append((start, stop, track, name, args))
            self._busy[track] = stop


def _process(replica: int | None) -> str:
    return "driver" if replica is None else f"replica {replica}"


def _attempt(event: Args) -> Any:
    return event.get("attempt") or (event["stage"], event["range"])
