"""The stages of a planned run: seconds by what they go into, and bytes on device and host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.config import Config
from ghost_dist.devices import SHARE_OF_FREE_MEMORY, free_bytes, host_free_bytes
from ghost_dist.errors import ConfigError
from ghost_dist.planning.engine_choice import EngineChoice
from ghost_dist.planning.memory import asked_bytes, host_bytes, streams_bytes
from ghost_dist.planning.probe_files import cached_share
from ghost_dist.planning.rates import Rates
from ghost_dist.planning.run_shape import RunShape
from ghost_dist.planning.stage_work import Cache, work_of_stages
from ghost_dist.planning.work import Work

KEPT_BY_SHARDING = 0.8
"""Share of the forward's rate that ranks keep that wait for each other; assumed, not measured."""


@dataclass(frozen=True)
class StagePlan:
    """One stage."""

    name: str  # as in result.json
    seconds: float
    parts: Mapping[str, float]  # the seconds, by what they go into
    flops: int
    read_bytes: int  # of the checkpoint
    written_bytes: int
    device_bytes: int  # at most, beside what libraries take; as are the next
    host_bytes: int
    streams: str  # offloaded: where activations wait between layers: device, host, disk; else empty


def plan_stages(
    config: Config,
    source: Checkpoint,
    run: RunShape,
    choice: EngineChoice,
    rates: Rates,
    dtype: torch.dtype,
    device: torch.device,
    tokens_s: float,
) -> tuple[StagePlan, ...]:
    """Every stage that the run has, in order; refused if one needs more memory than there is."""
    on_cpu = device.type == "cpu"
    held = run.sizes.stored_bytes + choice.device_bytes.get("calibrate", 0) * on_cpu
    works = work_of_stages(
        run,
        choice.kind,
        Cache(cached_share(source), held < SHARE_OF_FREE_MEMORY * host_free_bytes()),
        tokens_s,
        keeps_sums=on_cpu,
        prefetch=choice.prefetch,
        experts=choice.experts,
    )
    compute = str(dtype).removeprefix("torch.")
    plans = []
    for name, work in works.items():
        parts = _seconds(config, run, choice, name, work, rates, compute)
        device_bytes, host, streams = _memory(config, run, choice, name, device)
        plans.append(
            StagePlan(
                name=name,
                seconds=sum(parts.values()),
                parts=parts,
                flops=work.flops,
                read_bytes=work.read_bytes,
                written_bytes=work.written_bytes + work.commit_bytes,
                device_bytes=device_bytes,
                host_bytes=host,
                streams=streams,
            )
        )
    return tuple(plans)


def cluster_note(config: Config, choice: EngineChoice) -> str:
    """What is assumed of a cluster."""
    ranks = config.engine.ranks
    share = (
        f"{ranks} ranks, which share the windows and one reading"
        if choice.kind == "streaming"
        else f"{ranks} ranks, which keep {KEPT_BY_SHARDING:.0%} of the forward's rate where they "
        "share a layer"
    )
    replicas = _replicas(config)
    return (
        f"cluster: every device is taken to be as fast as this one, {replicas} replicas of {share}"
    )


def _replicas(config: Config) -> int:
    return 1 if config.engine.replicas == "auto" else config.engine.replicas


def _seconds(
    config: Config,
    run: RunShape,
    choice: EngineChoice,
    name: str,
    work: Work,
    rates: Rates,
    compute: str,
) -> dict[str, float]:
    """Of a stage by what they go into; what replicas and their ranks share is divided."""
    if not config.on_cluster or name not in ("select", "calibrate"):
        return work.seconds(rates, compute)
    replicas, ranks = _replicas(config), config.engine.ranks
    divisors: dict[str, float] = {"sums": replicas * ranks, "store": replicas}
    if choice.kind == "streaming":
        ranges = run.folds if name == "select" else run.num_ranges
        work = _streamed_by_replicas(work, ranges, replicas, ranks)
    else:  # each reads for itself
        degree = config.engine.tensor_parallel
        keep = KEPT_BY_SHARDING if degree > 1 else 1.0
        divisors |= {"forward": replicas * degree * keep, "sums": replicas * degree}
    parts = work.seconds(rates, compute)
    return {part: seconds / divisors.get(part, 1) for part, seconds in parts.items()}


def _streamed_by_replicas(work: Work, ranges: int, replicas: int, ranks: int) -> Work:
    """Reading and the forward of the replica with most ranges, each a sweep of its own.

    Its ranks share the windows, and what is read once between them: they are taken to share a disk.
    What is read is set in ``work`` too; its FLOPs stay those of all replicas.
    """
    sweeps = -(-ranges // replicas)
    work.read_bytes *= sweeps
    work.load_bytes *= sweeps
    work.load_tensors *= sweeps
    return replace(
        work,
        layers=[(layer, tokens * sweeps // (ranges * ranks)) for layer, tokens in work.layers],
        forwards=work.forwards * sweeps / (ranges * ranks),
    )


def _memory(
    config: Config, run: RunShape, choice: EngineChoice, name: str, device: torch.device
) -> tuple[int, int, str]:
    """Bytes of a stage on the device and in host memory, and where streams wait (offloaded)."""
    if name not in choice.device_bytes:
        return 0, 0, ""
    on_device, on_host, streams = choice.device_bytes[name], 0, ""
    on_gpu = device.type != "cpu"
    if on_gpu:
        on_host = host_bytes(run, name, choice.kind, copies=2 if config.on_cluster else 1)
    free_host = host_free_bytes()
    room, host_room = SHARE_OF_FREE_MEMORY * free_bytes(device), SHARE_OF_FREE_MEMORY * free_host
    allowed = (
        f"{free_host / 1e9:.2f} GB are free, of which {SHARE_OF_FREE_MEMORY:.0%} may be filled"
    )
    if choice.kind == "streaming":
        ranks = config.engine.ranks if config.on_cluster else None
        waiting = streams_bytes(run, name, ranks)
        if on_device + waiting <= room:
            streams, on_device = "device", on_device + waiting
        elif on_gpu and on_host + waiting <= host_room:
            streams, on_host = "host", on_host + waiting
        else:
            streams = "disk"
        asked = asked_bytes(run, name, ranks) if choice.experts is not None and on_gpu else 0
        if on_device + asked <= room:
            on_device += asked
        elif on_host + asked <= host_room:
            on_host += asked
        elif asked:
            raise ConfigError(
                f"Stage {name} needs {(on_host + asked) / 1e9:.2f} GB of host memory, "
                f"{asked / 1e9:.2f} GB of it for what a layer's experts are asked and answer "
                f"(engine.experts), but {allowed}. Take fewer calibration.windows or "
                "evaluation.windows, or more memory."
            )
    if on_host > host_room:
        raise ConfigError(
            f"Stage {name} needs {on_host / 1e9:.2f} GB of host memory, but {allowed}. Take "
            "operator.name=ghost (sums of C^2 instead of (C + F)^2), or more memory."
        )
    return on_device, on_host, streams
