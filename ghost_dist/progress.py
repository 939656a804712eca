"""What a person sees while a run works, and the same as events for programs.

On a terminal each stage is a live bar; elsewhere (a log file, a job) a line with the time every few
seconds, also while nothing is finished.
"""

import contextlib
import json
import re
import runpy
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ghost_dist.errors import ConfigError

PLAIN_LINE_EVERY_S = 5.0
SHORT_S = 2.0  # what takes less is not worth a line
_KEPT_EVENTS = 5
_NUMBERED = re.compile(r" \d+/\d+$")  # one of several stages of a kind
_RATED_OVER_S = 60.0  # what came long before says little: another pass, a busy machine
_RATED = ("tokens", "bytes", "evaluations")  # units whose rate says something

Advance = Callable[[int], None]
Listener = Callable[[dict[str, Any]], None]
"""Is given each event, as ``events.jsonl`` has it, in the process that runs the stages."""


class Gauge:
    """How far a stage is, in words; ``total`` 0: nothing in it can be counted; units are plural."""

    def __init__(
        self, total: int, unit: str, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.unit, self.done, self.clock = total, unit, done, clock
        self.began = self.latest = clock()  # latest: time of the last advance
        self._marks = deque([(self.began, done)])  # time and what was done, of the last minute

    def advance(self, amount: int) -> None:
        self.done += amount
        self.latest = self.clock()
        self._marks.append((self.latest, self.done))
        while len(self._marks) > 2 and self._marks[1][0] <= self.latest - _RATED_OVER_S:
            self._marks.popleft()

    def words(self, doing: str = "") -> str:
        """``8,192 of 32,768 tokens, 909/s, 27 s left``; an estimate goes on counting.

        ``doing``: what is at hand, in the place of the rate.
        """
        so_far = f"{duration(self.clock() - self.began)} so far"
        if not self.total:
            return so_far
        now = self.numbers()
        left, rate = now["seconds_left"] or 0.0, doing
        if now["per_second"] is not None and self.unit in _RATED:
            rate = doing or self._rate(now["per_second"])
        counted = f"{self._number(self.done)} of {self._amount(self.total)}"
        after = f"{duration(left)} left" if left >= 1 else so_far
        return ", ".join(filter(None, (counted, rate, after)))

    def numbers(self) -> dict[str, Any]:
        """The same for programs; a rate of None: nothing is known yet."""
        counted = {"done": self.done, "total": self.total, "unit": self.unit}
        began, first = self._marks[0]
        moved, elapsed = self.done - first, self.latest - began
        if moved <= 0 or elapsed <= 0:
            return {**counted, "per_second": None, "seconds_left": None}
        left = (self.total - self.done) * elapsed / moved - (self.clock() - self.latest)
        return {**counted, "per_second": moved / elapsed, "seconds_left": max(0.0, left)}

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
    """Progress and messages for a person (on standard error), and events, a JSON object a line.

    ``listeners`` are called with each event, and every few seconds with one of the kind
    ``progress``: the numbers of the stage, and what else is kept in :attr:`at_work`.
    """

    def __init__(
        self,
        events_path: Path | None = None,
        console: Console | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.console = console or Console(stderr=True)
        self.listeners = tuple(listeners)
        self.at_work: dict[str, Any] = {}
        self._part, self._doing, self._ended = "", "", set[str]()
        self._taken: list[str] = []  # and not told yet
        self._events_path = events_path
        self._telling, self._failed = threading.RLock(), set[Listener]()

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event with the time in seconds since 1970."""
        event = {"time": round(time.time(), 3), "event": kind, **fields}
        if self._events_path is not None:
            with self._events_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        self._tell(event)

    def _tell(self, event: dict[str, Any]) -> None:
        """Call the listeners, one at a time; what goes wrong in one is said once."""
        with self._telling:
            for listener in self.listeners:
                try:
                    listener(dict(event))
                except (Exception, SystemExit) as error:
                    if _stopped(error):
                        raise
                    if listener not in self._failed:
                        self._failed.add(listener)
                        self.warn(
                            f"output.callback failed at the event {event['event']} "
                            f"({type(error).__name__}: {error}). The run goes on, and so do its "
                            "calls; what else goes wrong there is not said."
                        )

    def say(self, message: str) -> None:
        """One plain line for the person."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """A warning for the person and the events."""
        self.console.print(f"warning: {message}", markup=False, style="yellow", soft_wrap=True)
        self.event("warning", message=message)

    def taken(self, what: str) -> None:
        """What was done before; one line says all of it, before the next stage begins."""
        self._taken.append(what)

    def tell_taken(self) -> None:
        if self._taken:
            self.say(f"taken from RUN: {', '.join(self._taken)}")
            self._taken.clear()

    def doing(self, what: str) -> None:
        """What the stage at hand is at while its count stands still; "": nothing of the kind."""
        self._doing = what

    @contextlib.contextmanager
    def at(self, part: str) -> Iterator[None]:
        """Put ``part`` (of how many) before stages within; behind one in another it stays."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = max(before, part) if before else ""

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Show a stage of ``total`` units, ``done`` of them already finished; gives ``advance``.

        A ``name`` may end in a number, 2/4, which its events do not have.
        """
        self.tell_taken()
        kind = _NUMBERED.sub("", name)
        self.event("stage-start", stage=kind, total=total, unit=unit, done=done)
        gauge = Gauge(total, unit, done)
        try:
            with self._shown(name, gauge):
                yield gauge.advance
        except BaseException as error:
            self.event("stage-failed", stage=kind, error=f"{type(error).__name__}: {error}")
            raise
        seconds = time.monotonic() - gauge.began
        if seconds >= SHORT_S or kind not in self._ended:  # short ones that come again are many
            self._line(name, gauge.summary())
        self._ended.add(kind)
        self.event("stage-end", stage=kind, seconds=round(seconds, 3))

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
        over, terminal = threading.Event(), self.console.is_terminal

        def words() -> str:
            return gauge.words(self._doing)

        def numbers() -> None:
            now = {"part": self._part.strip(), "stage": name, "words": words()}
            now |= {**gauge.numbers(), **self.at_work}
            self._tell({"time": round(time.time(), 3), "event": "progress", **now})

        def tell() -> None:
            while not over.wait(PLAIN_LINE_EVERY_S):
                if not terminal:
                    self._line(name, words())
                numbers()

        numbers()
        teller = threading.Thread(target=tell, name="progress", daemon=True)
        teller.start()
        try:
            with self._bar(name, gauge, words) if terminal else contextlib.nullcontext():
                yield
        finally:
            over.set()
            teller.join()
            self._doing = ""
            numbers()

    def _bar(self, name: str, gauge: Gauge, words: Callable[[], str]) -> Live:
        title = f"{self._part}{name}".ljust(18)

        def shown() -> Table:
            row = Table.grid(padding=(0, 1))
            row.add_column(no_wrap=True)
            bar = ProgressBar(gauge.total or None, gauge.done, width=5)
            row.add_row(Text(title), bar, Text(words()))
            return row

        return Live(
            console=self.console, get_renderable=shown, transient=True, refresh_per_second=10
        )

    def _line(self, name: str, words: str) -> None:
        self.say(f"{time.strftime('%H:%M:%S')} {self._part}{name}: {words}")


class StatusFile:
    """A listener that keeps in a file, as JSON in one line, what the run is at and how it fares."""

    def __init__(self, path: Path) -> None:
        self._path, self._status = path, dict[str, Any](progress=None, lost=0, failures=[])
        self._events: deque[dict[str, Any]] = deque(maxlen=_KEPT_EVENTS)

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            self._status["progress"] = event
        else:
            self._events.append(event)
        if event["event"] == "replica-lost":
            self._status["lost"] += 1
            self._status["failures"] += [event["file"]] if event["file"] else []
        beside = self._path.with_name(f"{self._path.name}.new")
        with contextlib.suppress(OSError):  # of a full disk, say: the run goes on without
            beside.write_text(json.dumps({**self._status, "events": list(self._events)}) + "\n")
            beside.replace(self._path)


def callback_of(path: str) -> Listener:
    """The function that ``FILE.py:NAME`` is."""
    file, _, name = path.rpartition(":")
    cause: BaseException | None = None
    try:
        function: Listener | None = runpy.run_path(file).get(name) if file else None
        if callable(function):
            return function
        why = f"{file} has no function {name}" if file else "it names no file"
    except (Exception, SystemExit) as error:  # whatever that file does
        if _stopped(error):
            raise
        cause, why = error, f"{type(error).__name__}: {error}"
    raise ConfigError(
        f"output.callback={path} cannot be used ({why}). Expected FILE.py:FUNCTION, a function of "
        "one event."
    ) from cause


def _stopped(error: BaseException) -> bool:
    """Whether a signal's handler raised it (the CLI's, Ray's), and not what was interrupted."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    handlers = map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))
    return frame.f_code in [getattr(handler, "__code__", None) for handler in handlers]


def duration(seconds: float) -> str:
    """``3.2 s``, ``45 s``, ``4 min``, ``2 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
