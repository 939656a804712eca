"""The trace against events of known times, and of a real run of one process."""

import json

import pytest
from trace_files import check_format, named

from ghost_dist.cli import app
from ghost_dist.errors import ConfigError
from ghost_dist.pipeline.recover import recover
from ghost_dist.report.trace import trace_of


def told(time, event, **fields):
    return {"time": 1000 + time, "event": event, **fields}


CLUSTER = [
    told(0, "run-start", version="1", command="recover"),
    told(1, "stage-start", stage="calibrate", total=8, unit="tokens", done=0),
    told(1, "replica-start", replica=0, ranks=2),
    told(1, "replica-start", replica=1, ranks=2),
    told(6, "replica-ready", replica=0, seconds=5, load_s=2, nodes=["a", "b"], pids=[7, 8]),
    told(6, "range-leased", stage="calibrate", range=0, attempt="x", replica=0),
    told(16, "range-ran", range=0, attempt="x", replica=0, forward_s=[6, 7], sums_s=[3, 1.5]),
    told(16, "range-leased", stage="calibrate", range=1, attempt="y", replica=0),
    told(18, "range-committed", stage="calibrate", range=0, attempt="x", replica=0, seconds=12),
    told(20, "warning", message="lost replica 0"),
    told(20, "replica-lost", replica=0, failure="crash", detail="rank 1 died"),
    told(20, "replica-end", replica=0),
    told(21, "replica-ready", replica=1, seconds=20, load_s=1, nodes=["a", "b"], pids=[9, 10]),
    told(22, "range-leased", stage="calibrate", range=1, attempt="z", replica=1),
    told(25, "range-ran", range=1, attempt="z", replica=1, forward_s=[1, 2], sums_s=[2.001, 1]),
    told(26, "range-committed", stage="calibrate", range=1, attempt="z", replica=1, seconds=4),
    told(27, "stage-end", stage="calibrate", seconds=26),
    told(28, "span-leased", span="[1, 3)", replica=1, rank=1),
    told(30, "span-fitted", span="[1, 3)", replica=1, rank=1, fits=4),
    told(31, "replica-end", replica=1),
    told(31, "waited", what="verify", seconds=0.5),
    told(32, "run-end"),
]


def test_spans_of_a_cluster():
    trace = trace_of(CLUSTER)
    check_format(trace)
    assert named(trace) == {
        ("driver", "run"): [("run", 0, 32)],
        ("driver", "stages"): [("calibrate", 1, 27), ("verify", 30.5, 31)],
        ("replica 0", "rank 0"): [
            ("start", 1, 4),
            ("load", 4, 6),
            ("forward", 6, 12),
            ("sums", 12, 15),
            ("wait", 15, 16),
            ("range", 16, 20),
        ],
        ("replica 0", "rank 1"): [
            ("start", 1, 4),
            ("load", 4, 6),
            ("forward", 6, 13),
            ("sums", 13, 14.5),
            ("wait", 14.5, 16),
            ("range", 16, 20),
        ],
        ("replica 0", "rank 0 writes"): [("write", 16, 18)],
        ("replica 0", "rank 1 writes"): [("write", 16, 18)],
        ("replica 1", "rank 0"): [
            ("start", 1, 20),
            ("load", 20, 21),
            ("wait", 21, 22),
            ("forward", 22, 23),
            ("sums", 23, 25),
            ("wait", 25, 31),
        ],
        ("replica 1", "rank 1"): [
            ("start", 1, 20),
            ("load", 20, 21),
            ("wait", 21, 22),
            ("forward", 22, 24),
            ("sums", 24, 25),
            ("wait", 25, 28),
            ("fit", 28, 30),
            ("wait", 30, 31),
        ],
        ("replica 1", "rank 0 writes"): [("write", 25, 26)],
        ("replica 1", "rank 1 writes"): [("write", 25, 26)],
    }
    entries = trace["traceEvents"]
    instants = [(e["name"], e["ts"]) for e in entries if e["ph"] == "i"]
    assert instants == [("run-start", 0), ("warning", 20_000_000), ("replica-lost", 20_000_000)]
    given_up = [e["args"]["range"] for e in entries if e.get("args", {}).get("given_up")]
    assert given_up == [1, 1]


def test_a_run_that_was_killed_and_continued():
    """Replicas and ranges have the same numbers again; what was open ends with the last event."""
    trace = trace_of([*CLUSTER[:8], *(event | {"time": event["time"] + 100} for event in CLUSTER)])
    check_format(trace)
    tracks = named(trace)
    assert tracks["driver", "run"] == [("run", 0, 16), ("run", 100, 132)]
    assert tracks["driver", "stages"][0] == ("calibrate", 1, 16)
    assert tracks["replica 0", "rank 0 writes"] == [("write", 116, 118)]
    assert tracks["replica 0", "rank 0"][:5][-1] == ("wait", 15, 16)
    assert tracks["replica 0", "rank 0"][5][:2] == ("start", 101)
    assert tracks["replica 1", "rank 0"][0] == ("start", 1, 16)


def test_nothing_begins_before_its_run_by_rounding():
    events = [
        {"event": "run-start", "time": 7.0, "version": "0.1.0", "command": "c"},
        {"event": "waited", "time": 7.066, "what": "opening", "seconds": 0.067},
        {"event": "run-end", "time": 8.0, "perplexity": {}},
    ]
    tracks = named(trace_of(events))
    assert tracks["driver", "run"] == [("run", 0, 1)]
    assert tracks["driver", "stages"] == [("opening", 0, pytest.approx(0.066))]


@pytest.mark.model
def test_trace_of_a_real_run(make_config, tmp_path, capsys):
    config = make_config(selection__spans=None, selection__remove=1)
    recover(config)
    run, file = str(tmp_path / "run"), str(tmp_path / "trace.json")
    app(["report", run, "--trace", file], standalone_mode=False)
    assert f"trace: {file} (open it at https://ui.perfetto.dev)" in capsys.readouterr().out
    trace = json.loads((tmp_path / "trace.json").read_bytes())
    check_format(trace)
    with pytest.raises(ConfigError, match="one RUN"):
        app(["report", run, run, "--trace", file], standalone_mode=False)
    tracks = named(trace)
    ((_, began, ended),) = tracks["driver", "run"]
    stages = tracks["driver", "stages"]
    assert {"select", "calibrate", "solve", "export"} <= {name for name, *_ in stages}
    assert began == 0
    for spans in tracks.values():
        assert all(0 <= start <= stop <= ended for _, start, stop in spans)
    ranks = tracks["driver", "rank 0"]
    assert [name for name, *_ in ranks].count("forward") == 2 * 4  # one per fold and stage
    (start, stop) = next(span[1:] for span in stages if span[0] == "calibrate")
    assert sum(start <= begun + 0.01 and end <= stop for _, begun, end in ranks) >= 4
    assert len(tracks["driver", "rank 0 writes"]) >= 4
