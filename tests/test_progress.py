"""What is said while work goes on: units, rates, and estimates that do not stand still."""

import io
import json
import re
import time

import pytest
from rich.console import Console

from ghost_dist import progress
from ghost_dist.progress import Gauge, Reporter


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def gauge_after(total, unit, done, seconds, waited=0.0):
    clock = Clock()
    gauge = Gauge(total, unit, clock=clock)
    clock.now += seconds
    gauge.advance(done)
    clock.now += waited
    return gauge


@pytest.mark.parametrize(
    ("total", "unit", "done", "seconds", "waited", "words"),
    [
        (32768, "tokens", 8192, 9.0, 0.0, "8,192 of 32,768 tokens, 910/s, 27 s left"),
        # No step for 20 s: the estimate is older, and says so.
        (32768, "tokens", 8192, 9.0, 20.0, "8,192 of 32,768 tokens, 910/s, 7.0 s left"),
        (32768, "tokens", 8192, 9.0, 60.0, "8,192 of 32,768 tokens, 910/s, 69 s so far"),
        (9, "fits", 2, 7.0, 0.0, "2 of 9 fits, 24 s left"),
        (9, "fits", 0, 0.0, 12.0, "0 of 9 fits, 12 s so far"),
        (4 * 10**9, "bytes", 10**9, 2.0, 0.0, "1.00 GB of 4.00 GB, 500.0 MB/s, 6.0 s left"),
        (40000, "tokens", 10, 10.0, 0.0, "10 of 40,000 tokens, 1/s, 11 h 06 min left"),
        (99, "evaluations", 2, 7.0, 0.0, "2 of 99 evaluations, 3.5 s/evaluation, 6 min left"),
        (0, "", 0, 0.0, 250.0, "4 min so far"),
    ],
)
def test_words(total, unit, done, seconds, waited, words):
    assert gauge_after(total, unit, done, seconds, waited).words() == words


def test_what_is_at_hand_takes_the_place_of_a_rate():
    gauge = gauge_after(900, "evaluations", 0, 7.0)
    assert gauge.words("fit 2/30") == "0 of 900 evaluations, fit 2/30, 7.0 s so far"
    gauge = gauge_after(900, "evaluations", 10, 1.0)
    assert gauge.words("fit 2/30") == "10 of 900 evaluations, fit 2/30, 89 s left"


def test_a_continued_stage_does_not_count_what_was_there():
    clock = Clock()
    gauge = Gauge(100, "tokens", 80, clock=clock)
    clock.now += 5
    gauge.advance(10)
    assert gauge.words() == "90 of 100 tokens, 2/s, 5.0 s left"


def test_a_log_has_a_line_with_the_time_while_nothing_is_finished(monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "PLAIN_LINE_EVERY_S", 0.01)
    console = Console(file=io.StringIO(), width=200)
    reporter = Reporter(tmp_path / "events.jsonl", console)
    with reporter.at("2/6 "), reporter.stage("solve", 4, "fits") as advance:
        while "solve: 0 of 4 fits" not in console.file.getvalue():
            time.sleep(0.001)
        advance(4)
    with reporter.waiting("soon done"):
        pass
    lines = console.file.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d (2/6 )?(solve|soon)", line) for line in lines)
    assert re.search(r"2/6 solve: 4 fits in \d\.\d s$", lines[-1])  # what was soon done has none
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["stage-start", "stage-end", "waited"]
    assert events[0]["stage"] == "solve"


def test_the_number_of_a_stage_does_not_go_back():
    console = Console(file=io.StringIO(), width=200)
    reporter = Reporter(console=console)
    with reporter.at("5/6 "):
        with reporter.at("6/6 "), reporter.stage("evaluate", 1, "tokens"):
            pass
        with reporter.stage("verify", 1, "tokens"):
            pass
    for number in "12":  # a short one that comes again has one line
        with reporter.stage(f"behind {number}/2", 1, "tokens"):
            pass
    parts = [line.split()[1] for line in console.file.getvalue().splitlines()]
    assert parts == ["6/6", "6/6", "behind"]


def test_all_that_is_said_fits_a_terminal_of_80_columns():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    reporter = Reporter(console=console)
    with reporter.at("2/6 "), reporter.stage("compare ridges 2/4", 32768, "tokens") as advance:
        advance(8192)
        time.sleep(0.01)
    printed = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert re.search(r"8,192 of 32,768 tokens, [\d,]+/s, \d[\d.]* s (left|so far)", printed)
    with reporter.at("2/6 "), reporter.stage("search", 28698, "evaluations") as advance:
        advance(12345)
        reporter.doing("refit 12/16")
        time.sleep(0.01)
    printed = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert re.search(r"12,345 of 28,698 evaluations, refit 12/16, \d[\d.]* s (left|so)", printed)


def test_the_rate_is_of_the_last_minute():
    """What took long before the first of them says nothing of the others."""
    clock = Clock()
    gauge = Gauge(1000, "evaluations", clock=clock)
    clock.now += 300
    gauge.advance(1)
    for _ in range(90):
        clock.now += 1
        gauge.advance(2)
    now = gauge.numbers()
    assert now["per_second"] == pytest.approx(2)
    assert now["seconds_left"] == pytest.approx((1000 - 181) / 2)
