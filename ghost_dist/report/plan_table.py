"""A plan as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_plan(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """Print engine, stages, disk and assumptions, from the plain values of a plan."""
    console = console or Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    spans = ", ".join(f"[{start}, {stop})" for start, stop in plan["spans"])
    say(
        f"{plan['model']}: {plan['num_layers']} layers, removing {spans}"
        f"{'' if plan['spans_known'] else ' or others'}; {plan['dtype']}, batch {plan['batch']}"
    )
    say(
        f"{plan['device']}: {_gb(plan['free_device_bytes'])} free; host "
        f"{_gb(plan['free_host_bytes'])}, disk {_gb(plan['free_disk_bytes'])} free"
    )
    engine = plan["engine"]
    say(f"engine {engine['kind']}: {engine['reason']}")
    table = Table("stage", "time", "most of it", "TFLOP", "read", "written", "device", "host")
    streams = any(stage["streams"] for stage in plan["stages"])
    if streams:
        table.add_column("streams in")
    for stage in plan["stages"]:
        part = max(stage["parts"], key=stage["parts"].get, default=None)
        table.add_row(
            stage["name"],
            _duration(stage["seconds"]),
            f"{part} {stage['parts'][part] / stage['seconds']:.0%}" if part else "-",
            f"{stage['flops'] / 1e12:,.0f}",
            *(
                _gb(stage[name]) if stage[name] else "-"
                for name in ("read_bytes", "written_bytes", "device_bytes", "host_bytes")
            ),
            *([stage["streams"] or "-"] if streams else []),
        )
    table.add_section()
    total = ("all", _duration(plan["seconds"]), "", f"{plan['flops'] / 1e12:,.0f}")
    table.add_row(*total)
    console.print(table)
    parts = ", ".join(f"{name} {_gb(nbytes)}" for name, nbytes in plan["disk_bytes"].items())
    say(f"RUN on the disk: {_gb(sum(plan['disk_bytes'].values()))} ({parts})")
    for note in plan["notes"]:
        say(f"assumed: {note}")


def _gb(nbytes: int) -> str:
    if nbytes < 1e8:
        return f"{nbytes / 1e6:.1f} MB"
    return f"{nbytes / 1e9:.2f} GB" if nbytes < 1e11 else f"{nbytes / 1e12:.2f} TB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
