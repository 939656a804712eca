"""The stages of a planned run: what each says of itself, in seconds of this machine."""

from collections.abc import Mapping
from dataclasses import dataclass

from ghost_dist.devices import SHARE_OF_FREE_MEMORY, host_free_bytes
from ghost_dist.engines.memory import EngineChoice
from ghost_dist.errors import ConfigError
from ghost_dist.pipeline.cost import Cost
from ghost_dist.pipeline.inputs import keeps_model
from ghost_dist.pipeline.run_shape import RunShape
from ghost_dist.planning.rates import Rates, cached_share
from ghost_dist.statistics.at_hand import SHARE_AT_HAND

KEPT_BY_SHARDING = 0.8
"""Share of the forward's rate that ranks keep that wait for each other; assumed, not measured."""


@dataclass(frozen=True)
class StagePlan:
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
    run: RunShape, costs: Mapping[str, Cost], choice: EngineChoice, rates: Rates, tokens_s: float
) -> tuple[StagePlan, ...]:
    """Every stage that the run has, in order; refused if one needs more memory than there is.

    A resident engine loads the model for a stage that runs it, if it is not kept from before; from
    the page cache if the checkpoint stays there. An offloaded one reads past that.
    """
    of_tokens = {"other": tokens_s} if tokens_s else {}
    plans = [StagePlan("tokens", tokens_s, of_tokens, 0, 0, 0, 0, 0, "")]
    streaming = choice.kind == "streaming"
    held = run.sizes.stored_bytes
    if run.inputs.device.type == "cpu":
        held += choice.device_bytes.get("calibrate", 0)
    stays = held < SHARE_OF_FREE_MEMORY * host_free_bytes()
    cached, kept = 0.0 if streaming else cached_share(run.inputs.source), False
    for name, cost in costs.items():
        sweeps = _shared(run, choice, cost)["sweeps"] if streaming else 1
        read_bytes = 0 if kept and not cost.written_bytes else cost.read_bytes(run.sizes)
        parts = stage_seconds(run, cost, choice, rates, cached, kept=kept)
        device_bytes, on_host, streams = _memory(run, name, cost, choice)
        plans.append(
            StagePlan(
                name=name,
                seconds=sum(parts.values()),
                parts=parts,
                flops=cost.flops(run.sizes, choice.experts),
                read_bytes=int(sweeps * read_bytes),
                written_bytes=cost.written_bytes + cost.commit_bytes,
                device_bytes=device_bytes,
                host_bytes=on_host,
                streams=streams,
            )
        )
        if read_bytes and not streaming:
            cached = 1.0 if stays else cached
            kept = not run.inputs.config.on_cluster and keeps_model(run.inputs)
    return tuple(plans)


def stage_seconds(
    run: RunShape,
    cost: Cost,
    choice: EngineChoice,
    rates: Rates,
    cached: float,
    *,
    kept: bool = False,
) -> dict[str, float]:
    """Seconds by what they go into; their sum is the stage's.

    ``cached`` is the share of the checkpoint that is in the page cache; ``kept``: whether the model
    is in memory.
    """
    share = _shared(run, choice, cost)
    dtype = str(run.inputs.dtype).removeprefix("torch.")
    plain = rates.products[dtype]  # of layers that were too large to be measured
    forward = sum(
        flops / rates.products.get(kind, plain)
        for kind, flops in cost.model_flops(run.sizes, choice.experts).items()
    )
    forward *= share["forward"]
    nbytes = share["sweeps"] * cost.read_bytes(run.sizes)
    read = (1 - cached) * nbytes / rates.read if cost.written_bytes or not kept else 0.0
    load = (nbytes * (not kept) + cost.written_bytes) / rates.load
    if choice.kind == "streaming" and not cost.written_bytes and choice.prefetch:
        read, load = max(0.0, read - forward), 0.0  # by threads of their own, meanwhile
    sums = share["sums"] * sum(n / rates.products[kind] for kind, n in cost.sums.items())
    stored = share["store"] * cost.commit_bytes / rates.write
    if run.inputs.config.on_cluster:  # ranks write while they run the next range
        stored = max(0.0, stored - forward - sums)
    stored += cost.sums_read_bytes / rates.load
    room = SHARE_AT_HAND * max(run.free_bytes, host_free_bytes())
    alone = choice.kind == "resident" and not run.inputs.config.on_cluster
    if alone and max(cost.commit_bytes, cost.sums_read_bytes) <= room:
        stored = 0.0  # sums stay in memory, and are written behind all that comes (StoreAtHand)
    parts = {
        "read": read,
        "load": load,
        "forward": forward,
        "sums": sums,
        "fit": sum(fit.steps * fit.flops / rates.factors[fit.kind] for fit in cost.fits),
        "store": stored,
        "write": cost.written_bytes / rates.write,
        "move": cost.moved_bytes / rates.load,
        "processes": rates.process_s if cost.written_bytes else 0.0,
    }
    return {name: seconds for name, seconds in parts.items() if seconds > 0}


def _shared(run: RunShape, choice: EngineChoice, cost: Cost) -> dict[str, float]:
    """What a replica has of each part of a stage, and its sweeps over the layers (offloaded)."""
    engine, alone = run.inputs.config.engine, dict.fromkeys(("forward", "sums", "store"), 1.0)
    if not (run.inputs.config.on_cluster and (cost.ranges or cost.leased)):
        return {**alone, "sweeps": cost.reads if choice.kind == "streaming" else 1}
    replicas = num_replicas(run)
    if cost.leased:
        share = 1 / (replicas * engine.ranks)
        whole = cost.resident_bytes(run.sizes) <= SHARE_OF_FREE_MEMORY * run.free_bytes
        return {**alone, "forward": share, "sums": share, "sweeps": 1 if whole else cost.reads}
    if choice.kind == "streaming":
        # Of the replica with most ranges, whose ranks share the windows and one reading.
        sweeps = -(-cost.ranges // replicas)
        forward = sweeps / (cost.ranges * engine.ranks)
        sums = 1 / (replicas * engine.ranks)
    else:  # each reads for itself
        sweeps, degree = 1, engine.tensor_parallel
        sums = 1 / (replicas * degree)
        forward = sums / (KEPT_BY_SHARDING if degree > 1 else 1.0)
    return {"forward": forward, "sums": sums, "store": 1 / replicas, "sweeps": sweeps}


def num_replicas(run: RunShape) -> int:
    """Of a cluster; as many as there is room for are reckoned as one."""
    replicas = run.inputs.config.engine.replicas
    return 1 if replicas == "auto" else replicas


def _memory(run: RunShape, name: str, cost: Cost, choice: EngineChoice) -> tuple[int, int, str]:
    """Bytes of a stage on the device and in host memory, and where streams wait (offloaded)."""
    if name not in choice.device_bytes:
        return 0, 0, ""
    config, on_gpu = run.inputs.config, run.inputs.device.type != "cpu"
    on_device, on_host, streams = choice.device_bytes[name], 0, ""
    if on_gpu:
        on_host = cost.on_host(choice.kind, copies=2 if config.on_cluster else 1)
    free_host = host_free_bytes()
    room, host_room = SHARE_OF_FREE_MEMORY * run.free_bytes, SHARE_OF_FREE_MEMORY * free_host
    allowed = (
        f"{free_host / 1e9:.2f} GB are free, of which {SHARE_OF_FREE_MEMORY:.0%} may be filled"
    )

    def place(nbytes: int) -> str:
        nonlocal on_device, on_host
        if on_device + nbytes <= room:
            on_device += nbytes
            return "device"
        if on_gpu and on_host + nbytes <= host_room:
            on_host += nbytes
            return "host"
        return "disk"

    if choice.kind == "streaming":
        ranks = config.engine.ranks if config.on_cluster else None
        streams = place(cost.waiting_bytes(run.num_windows, ranks))
        asked = cost.asked_bytes(run.sizes, run.num_windows, ranks)
        # On a CPU it was counted where the engine was chosen.
        if on_gpu and choice.experts is not None and place(asked) == "disk":
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
