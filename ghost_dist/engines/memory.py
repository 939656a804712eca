"""How much memory a device, or the host, has left for this process."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes, within what this process may use of it."""
    if device.type != "cuda":
        return host_free_bytes()
    free, total = torch.cuda.mem_get_info(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    allowed = torch.cuda.get_per_process_memory_fraction(index) * total
    return int(min(free, allowed - torch.cuda.memory_allocated(device)))


def host_free_bytes() -> int:
    """Host memory that this process can still have: what is available, below every limit set.

    Limits are those of the control group (a container, a job) and of ``ulimit -v`` and ``-d``.
    Pages of files are not counted as used: the kernel gives them back.
    """
    return max(0, min([_available(), *_left_in_cgroups(), *_left_below_ulimits()]))


def _available() -> int:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _left_in_cgroups() -> list[int]:
    left = []
    for limit_file, usage_file in _CGROUPS:
        limit, usage = ("".join(_lines(Path(file))) for file in (limit_file, usage_file))
        if not (limit.isdigit() and usage.isdigit()):
            continue  # "max", or no such control group
        statistics = dict(
            line.split(maxsplit=1) for line in _lines(Path(limit_file).with_name("memory.stat"))
        )
        cached = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
        left.append(int(limit) - int(usage) + cached)
    return left


def _left_below_ulimits() -> list[int]:
    status = dict(line.split(":", 1) for line in _lines(Path("/proc/self/status")) if ":" in line)
    left = []
    for limit, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, used = resource.getrlimit(limit)[0], status.get(field)
        if most != resource.RLIM_INFINITY and used is not None:
            left.append(most - int(used.split()[0]) * 1024)
    return left


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
