"""A trace as Perfetto reads it, and what its format asks for."""

import itertools
from collections import defaultdict


def named(trace):
    """Names of processes and threads, and the spans of each thread in order, in seconds."""
    entries = trace["traceEvents"]
    process = {e["pid"]: e["args"]["name"] for e in entries if e["name"] == "process_name"}
    thread = {
        (e["pid"], e["tid"]): (process[e["pid"]], e["args"]["name"])
        for e in entries
        if e["name"] == "thread_name"
    }
    assert len(set(thread.values())) == len(thread)
    spans = defaultdict(list)
    for e in entries:
        if e["ph"] == "X":
            began = e["ts"] / 1e6
            spans[thread[e["pid"], e["tid"]]].append((e["name"], began, began + e["dur"] / 1e6))
    return {track: sorted(found, key=lambda span: span[1]) for track, found in spans.items()}


def check_format(trace):
    """What the Trace Event Format asks of each entry, and that no spans of a track overlap."""
    for e in trace["traceEvents"]:
        assert e["ph"] in "XiM"
        assert isinstance(e["pid"], int)
        assert e["pid"] > 0  # 0 is the idle process of a kernel
        assert e["ph"] == "M" or (isinstance(e["ts"], int) and e["ts"] >= 0)
        assert e["ph"] != "X" or (isinstance(e["dur"], int) and e["dur"] >= 0)
        assert e["ph"] != "i" or e["s"] == "p"
    for spans in named(trace).values():
        for (_, _, stop), (_, start, _) in itertools.pairwise(spans):
            assert stop <= start + 1e-9
