"""What a person sees while a run works, and the same as events for programs.

On a terminal each stage is a live bar; elsewhere (a log file, a job) a line with the time every few
seconds, also while nothing is finished.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console
from rich.text import Text

PLAIN_LINE_EVERY_S = 5.0
SHORT_S = 2.0  # what takes less is not worth a line

Advance = Callable[[int], None]


class Gauge:
    """How far a stage is, in words; ``total`` 0: nothing in it can be counted; units are plural."""

    def __init__(
        self, total: int, unit: str, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.unit, self.first, self.done, self.clock = total, unit, done, done, clock
        self.began = self.latest = clock()  # latest: time of the last advance

    def advance(self, amount: int) -> None:
        self.done += amount
        self.latest = self.clock()

    def words(self) -> str:
        """``8,192 of 32,768 tokens, 909/s, 27 s left``; an estimate goes on counting."""
        now = self.clock()
        so_far = f"{duration(now - self.began)} so far"
        if not self.total:
            return so_far
        counted = f"{self._number(self.done)} of {self._amount(self.total)}"
        moved, elapsed = self.done - self.first, self.latest - self.began
        if moved <= 0 or elapsed <= 0:
            return f"{counted}, {so_far}"
        left = (self.total - self.done) * elapsed / moved - (now - self.latest)
        after = f"{duration(left)} left" if left >= 1 else so_far
        return f"{counted}, {self._rate(moved / elapsed)}, {after}"

    def summary(self) -> str:
        """``32,768 tokens in 36.0 s``, once it is over."""
        took = duration(self.clock() - self.began)
        return f"{self._amount(self.done) if self.total else 'done'} in {took}"

    def _number(self, number: float) -> str:
        if self.unit != "bytes":
            return f"{number:,.0f}"
        return f"{number / 1e6:,.1f} MB" if number < 1e9 else f"{number / 1e9:,.2f} GB"

    def _amount(self, number: float) -> str:
        if self.unit == "bytes":
            return self._number(number)
        return f"{self._number(number)} {self.unit.removesuffix('s') if number == 1 else self.unit}"

    def _rate(self, per_s: float) -> str:
        if per_s < 1:
            return f"{1 / per_s:,.1f} s/{self.unit.removesuffix('s')}"
        return f"{self._number(per_s)}/s"


class Reporter:
    """Progress and messages for a person (on standard error), and events, a JSON object a line."""

    def __init__(self, events_path: Path | None = None, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._part = ""
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
    def at(self, part: str) -> Iterator[None]:
        """Put ``part``, which of how many parts of the run it is at, before stages within."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Show a stage of ``total`` units, ``done`` of them already finished; gives ``advance``."""
        self.event("stage-start", stage=name, total=total, unit=unit, done=done)
        gauge = Gauge(total, unit, done)
        try:
            with self._shown(name, gauge):
                yield gauge.advance
        except BaseException as error:
            self.event("stage-failed", stage=name, error=f"{type(error).__name__}: {error}")
            raise
        self._line(name, gauge.summary())
        self.event("stage-end", stage=name, seconds=round(time.monotonic() - gauge.began, 3))

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Show that something works which cannot be counted; nothing if it is soon done."""
        gauge = Gauge(0, "")
        with self._shown(name, gauge):
            yield
        seconds = time.monotonic() - gauge.began
        self.event("waited", what=name, seconds=round(seconds, 3))
        if seconds >= SHORT_S:
            self._line(name, gauge.summary())

    @contextlib.contextmanager
    def _shown(self, name: str, gauge: Gauge) -> Iterator[None]:
        if self.console.is_terminal:
            left = (progress.TextColumn("{task.description:<18}"), progress.BarColumn(5))
            columns = (*left, _Words(gauge))
            with progress.Progress(*columns, console=self.console, transient=True) as bars:
                bars.add_task(
                    f"{self._part}{name}", total=gauge.total or None, completed=gauge.done
                )
                yield
            return
        over = threading.Event()

        def tell() -> None:
            while not over.wait(PLAIN_LINE_EVERY_S):
                self._line(name, gauge.words())

        teller = threading.Thread(target=tell, name="progress", daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join()

    def _line(self, name: str, words: str) -> None:
        self.say(f"{time.strftime('%H:%M:%S')} {self._part}{name}: {words}")


class _Words(progress.ProgressColumn):
    """What the gauge says, and the bar as far as it is."""

    def __init__(self, gauge: Gauge) -> None:
        super().__init__()
        self._gauge = gauge

    def render(self, task: progress.Task) -> Text:
        task.completed = self._gauge.done
        return Text(self._gauge.words())


def duration(seconds: float) -> str:
    """``3.2 s``, ``45 s``, ``4 min``, ``2 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
