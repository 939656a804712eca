"""Devices: the only module that talks to ``torch.cuda``, and it names the device every time.

What CUDA is not told a device for belongs to the *current* one, which is a thread's own and GPU 0
at first. A stream or an event of GPU 0 makes nothing wait on GPU 1: layers would be computed on
weights that are still being copied. So every function here takes the device.

A CPU has done what it was told when the call returns: its marks are None, nothing waits for them.
"""

import contextlib
import os
import platform
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn import functional

from ghost_dist.errors import ConfigError

SHARE_OF_FREE_MEMORY = 0.85
"""What may be filled of the memory that is free: allocators and libraries need some too."""

Event = torch.cuda.Event
Stream = torch.cuda.Stream

_ASKED_EVERY_S = 0.005

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def open_device(name: str) -> torch.device:
    """The device of ``engine.device``, begun; auto is the first GPU where there is one."""
    available = has_gpu()
    if name == "auto":
        name = "cuda:0" if available else "cpu"
    if name.startswith("cuda"):
        if not available:
            raise ConfigError(
                f"engine.device={name}, but torch sees no CUDA device. Use engine.device=cpu, or "
                "install a CUDA build of torch and check that nvidia-smi shows the GPU."
            )
        index, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
        if index >= count:
            raise ConfigError(
                f"engine.device={name}, but this machine has {count} GPUs (cuda:0 to "
                f"cuda:{count - 1})."
            )
        name = f"cuda:{index}"
    device = torch.device(name)
    begin(device)
    return device


def has_gpu() -> bool:
    return torch.cuda.is_available()


def begin(device: torch.device) -> None:
    """Initialise CUDA, and make ``device`` this thread's current one, for libraries that ask it."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.set_device(numbered(device))


def warm_up(name: str) -> None:
    """Begin the GPU of ``engine.device``, if there is one, in a thread, for its first real work.

    Its context and the libraries of products, attention and factorisations take seconds to load.
    """

    def work() -> None:
        with contextlib.suppress(Exception):  # `open_device` says what is wrong with it
            device = open_device(name)
            if device.type == "cuda":
                for dtype in (torch.bfloat16, torch.float32, torch.float64):
                    one = torch.ones((1, 1, 128, 128), dtype=dtype, device=device)
                    (one @ one).softmax(-1).mean().item()
                torch.linalg.cholesky(torch.eye(128, dtype=dtype, device=device))
                half = one.to(torch.bfloat16)
                functional.scaled_dot_product_attention(half, half, half, is_causal=True)

    threading.Thread(target=work, name="warm-up").start()


def numbered(device: torch.device) -> torch.device:
    """The same device for every thread: ``cuda`` without a number is this thread's current GPU."""
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def gpu_name(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device))


def device_name(device: torch.device) -> str:
    """Of a GPU with its driver's version, or of the CPU with the number of threads."""
    if device.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        version = driver.read_text().split("  ")[1:2] if driver.exists() else []
        return " ".join([gpu_name(device), *version])
    models = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def mark(device: torch.device, *, timing: bool = False) -> Event | None:
    """An event behind all that this thread has given a GPU so far, on its current stream."""
    if device.type != "cuda":
        return None
    return mark_of(torch.cuda.current_stream(device), timing=timing)


def mark_of(stream: Stream, *, timing: bool = False) -> Event:
    """An event behind all that was given a stream so far."""
    event = Event(enable_timing=timing)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def wait_for(device: torch.device, event: Event | None) -> None:
    """Let what this thread gives a GPU from now on wait for a mark; the host goes on."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)


def arrived(event: Event | None) -> None:
    """Wait, on the host, until a mark is passed."""
    if event is not None:
        event.synchronize()


def synchronize(device: torch.device) -> None:
    """Wait, on the host, for everything that a device was given by any thread."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def side_stream(device: torch.device) -> Stream:
    """A stream of a GPU beside the one that computes."""
    return Stream(device)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    """What this thread gives the stream's GPU goes to that stream."""
    # The guard keeps a thread whose current GPU is another one from beginning that one as well.
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


@contextlib.contextmanager
def watched_idle(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """Gives the share of the time so far in which a GPU had nothing to do; None for a CPU.

    A thread asks the stream that computes; copies on other streams are no work.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    stream, ended = torch.cuda.default_stream(device), threading.Event()
    idle_s = total_s = 0.0

    def watch() -> None:
        nonlocal idle_s, total_s
        last = time.monotonic()
        while not ended.wait(_ASKED_EVERY_S):
            idle, now = stream.query(), time.monotonic()
            idle_s += (now - last) * idle
            total_s += now - last
            last = now

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: idle_s / total_s if total_s else None
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def copies_beside(device: torch.device, ready: Event | None) -> Iterator[None]:
    """What this thread copies from a GPU waits for a mark only, not for what comes behind that."""
    if ready is None:
        yield
        return
    stream = side_stream(device)
    stream.wait_event(ready)
    with on_stream(stream):
        yield


def empty_at(
    where: torch.device, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Memory on a device, or on the host for it: page-locked, if a GPU copies from and to it."""
    pinned = device.type == "cuda" and where.type == "cpu"
    return torch.empty(*shape, dtype=dtype, device=where, pin_memory=pinned)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Products of float32 are not rounded to TF32, whatever the user has allowed."""
    matmul = torch.backends.cuda.matmul
    previous = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32 = previous


def allocated_bytes(device: torch.device) -> int:
    return int(torch.cuda.memory_allocated(device))


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most that tensors took on a GPU since :func:`reset_peak`; 0 for a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def release_cached(device: torch.device) -> None:
    """Give memory that the allocator keeps for the next tensors back to the GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes, within what this process may use of it."""
    if device.type != "cuda":
        return host_free_bytes()
    device = numbered(device)
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    return int(min(free, allowed - torch.cuda.memory_allocated(device)))


def total_bytes(device: torch.device) -> int:
    """Memory that this process may use of a GPU, whoever has some of it now; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    total = torch.cuda.get_device_properties(device).total_memory
    return int(torch.cuda.get_per_process_memory_fraction(numbered(device)) * total)


def free_or_cached_bytes(device: torch.device) -> int:
    """With what the allocator keeps for the next tensors."""
    free = free_bytes(device)
    if device.type == "cuda":
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free


def host_load() -> float:
    """Programs that wanted a CPU core in the last minute, for each core; 1: all were busy."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def host_free_bytes() -> int:
    """Host memory that can be had below all limits set; pages of files count as free."""
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
