"""What a person sees while a run works, and the same as events for programs.

On a terminal each stage is a live bar; elsewhere (a log file, a job) a plain line every few
seconds. Events are appended to ``RUN/events.jsonl``, one JSON object a line.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console

PLAIN_LINE_EVERY_S = 5.0

Advance = Callable[[int], None]


class Reporter:
    """Progress, messages and events of one run.

    Events go to ``RUN/events.jsonl``, if given; a person reads on standard error, so that standard
    output stays for results.
    """

    def __init__(self, events_path: Path | None = None, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._events_path = events_path

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event with the time in seconds since 1970."""
        if self._events_path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **fields})
        with self._events_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def say(self, message: str) -> None:
        """One plain line for the person."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """A warning for the person and the events."""
        self.console.print(f"warning: {message}", markup=False, style="yellow", soft_wrap=True)
        self.event("warning", message=message)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Show a stage of ``total`` units, ``done`` of them already finished; gives ``advance``."""
        self.event("stage-start", stage=name, total=total, unit=unit, done=done)
        began = time.monotonic()
        show = self._bar if self.console.is_terminal else self._lines
        try:
            with show(name, total, unit, done) as advance:
                yield advance
        except BaseException as error:
            self.event("stage-failed", stage=name, error=f"{type(error).__name__}: {error}")
            raise
        self.event("stage-end", stage=name, seconds=round(time.monotonic() - began, 3))

    @contextlib.contextmanager
    def _bar(self, name: str, total: int, unit: str, done: int) -> Iterator[Advance]:
        columns = (
            progress.TextColumn("{task.description:<24}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
        )
        began, first = time.monotonic(), done
        with progress.Progress(*columns, console=self.console) as bars:
            task = bars.add_task(name, total=total, completed=done, rate="")

            def advance(amount: int) -> None:
                nonlocal done
                done += amount
                rate = (done - first) / max(time.monotonic() - began, 1e-9)
                bars.update(task, completed=done, rate=f"{unit}, {rate:,.0f}/s")

            yield advance

    @contextlib.contextmanager
    def _lines(self, name: str, total: int, unit: str, done: int) -> Iterator[Advance]:
        began = printed = time.monotonic()
        first = done

        def advance(amount: int) -> None:
            nonlocal done, printed
            done += amount
            now = time.monotonic()
            if now - printed >= PLAIN_LINE_EVERY_S:
                printed = now
                rate = (done - first) / (now - began)
                left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
                self.say(f"{name}: {done:,} of {total:,} {unit}, {rate:,.0f}/s{left}")

        yield advance
        self.say(f"{name}: {done:,} {unit} in {time.monotonic() - began:.1f} s")
