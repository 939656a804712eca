"""Which engine runs a model: a pure function of what each needs and of what the device has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ghost_dist.devices import SHARE_OF_FREE_MEMORY
from ghost_dist.engines.expert_parts import even_part
from ghost_dist.errors import ConfigError

EngineKind = Literal["resident", "tensor_parallel", "streaming"]


@dataclass(frozen=True)
class DeviceNeeds:
    """Peak bytes on one device, by stage, for each engine.

    ``streaming_parts`` is of layers whose routed experts are held in parts, by their number in a
    part; ``tensor_parallel`` of one rank, by degree.
    """

    resident: Mapping[str, int]
    tensor_parallel: Mapping[int, Mapping[str, int]]
    degree: int  # configured; a key of tensor_parallel
    streaming: Mapping[str, int]  # two layers, three where experts have to be stacked
    streaming_one_layer: Mapping[str, int]  # read and then computed
    largest_layer: int  # alone, for the message
    streaming_parts: Mapping[int, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineChoice:
    """What runs, and why."""

    kind: EngineKind
    reason: str  # with the bytes that decided
    device_bytes: Mapping[str, int]
    prefetch: bool = True  # streaming: whether the next layer is read while one is computed
    experts: int | None = None  # streaming: routed ones of a layer held at once; None: all
    fits: bool = True  # false where the model has to be held whole, but does not fit


def choose_engine(
    kind: Literal["auto", "resident", "tensor_parallel", "streaming"],
    *,
    on_cluster: bool,
    needs: DeviceNeeds,
    free_bytes: int,
    where: str,
    experts: int | Literal["auto"] = "auto",
    whole: str | None = None,
) -> EngineChoice:
    """The engine of a run: the configured one if it fits, with ``auto`` the first that fits.

    ``auto``: resident if everything fits into 85 % of the free device memory (on a cluster, only
    where ranks do not share the layers by configuration); else tensor_parallel as configured on a
    cluster; else streaming. ``whole`` says what needs the whole model, which ``auto`` in one
    process then holds whole even where it does not fit. If nothing allowed fits the error says what
    would.
    """
    room = int(free_bytes * SHARE_OF_FREE_MEMORY)
    has = f"{where} has {_gb(free_bytes)} free, of which {SHARE_OF_FREE_MEMORY:.0%} may be filled"
    shared = needs.tensor_parallel[needs.degree]
    if kind == "resident" or (kind == "auto" and not (on_cluster and needs.degree > 1)):
        stage, peak = _peak(needs.resident)
        if peak <= room:
            return EngineChoice(
                "resident",
                f"the whole model fits on one device: at most {_gb(peak)} are needed ({stage}), "
                f"and {has}",
                needs.resident,
            )
        if whole is not None and kind == "auto" and not on_cluster:
            return EngineChoice(
                "resident",
                f"{whole} needs the model whole: it is loaded so, although {_gb(peak)} are needed "
                f"({stage}), and {has}",
                needs.resident,
                fits=False,
            )
        if kind == "resident":
            raise ConfigError(
                f"engine.kind=resident needs {_gb(peak)} on one device ({stage}), but {has}. "
                + _what_would_fit(needs, room)
            )
    if kind == "tensor_parallel" or (kind == "auto" and on_cluster):
        stage, peak = _peak(shared)
        if peak <= room:
            return EngineChoice(
                "tensor_parallel",
                f"{needs.degree} ranks share every layer: at most {_gb(peak)} are needed on each "
                f"({stage}), and {has}",
                shared,
            )
        raise ConfigError(
            f"engine.tensor_parallel={needs.degree} needs {_gb(peak)} on each rank ({stage}), but "
            f"{has}. " + _what_would_fit(needs, room)
        )
    whole = _gb(_peak(needs.resident)[1])
    why = f"the whole model would need {whole}" if kind == "auto" else "as configured"
    in_parts = experts if experts != "auto" and experts in needs.streaming_parts else None
    stage, peak = _peak(needs.streaming)
    if peak <= room and in_parts is None:
        count = "three" if needs.streaming_parts else "two"
        return EngineChoice(
            "streaming",
            f"{why}; {count} layers at a time need {_gb(peak)} ({stage}), and {has}",
            needs.streaming,
        )
    if needs.streaming_parts and (in_parts is not None or experts == "auto"):
        return _by_experts(needs, in_parts, room, why, has)
    stage, peak = _peak(needs.streaming_one_layer)
    if peak <= room:
        return EngineChoice(
            "streaming",
            f"{why}; one layer at a time, without prefetch, needs {_gb(peak)} ({stage}), and {has}",
            needs.streaming_one_layer,
            prefetch=False,
        )
    raise ConfigError(
        f"The model does not fit: even one layer at a time (engine.kind=streaming) needs "
        f"{_gb(peak)} ({stage}; the largest layer alone is {_gb(needs.largest_layer)}), but {has}. "
        + _what_would_fit(needs, room)
    )


def _by_experts(
    needs: DeviceNeeds, configured: int | None, room: int, why: str, has: str
) -> EngineChoice:
    """Layers with their experts in parts: as many as configured, or as fit."""
    count = max(needs.streaming_parts) + 1
    fitting = [n for n, of_parts in needs.streaming_parts.items() if _peak(of_parts)[1] <= room]
    at_once = configured
    if at_once is None and fitting:
        at_once = even_part(count, max(fitting))
    if at_once in fitting:
        assert at_once is not None
        stage, peak = _peak(needs.streaming_parts[at_once])
        return EngineChoice(
            "streaming",
            f"{why}; layers with {at_once} of {count} routed experts at a time need {_gb(peak)} "
            f"({stage}; the largest layer alone is {_gb(needs.largest_layer)}), and {has}",
            needs.streaming_parts[at_once],
            experts=at_once,
        )
    stage, peak = _peak(needs.streaming_parts[at_once or 1])
    raise ConfigError(
        f"The model does not fit: even {at_once or 1} of {count} routed experts of a layer at a "
        f"time (engine.kind=streaming, engine.experts) need {_gb(peak)} ({stage}; the largest "
        f"layer alone is {_gb(needs.largest_layer)}), but {has}. " + _what_would_fit(needs, room)
    )


def _what_would_fit(needs: DeviceNeeds, room: int) -> str:
    """Advice with numbers."""
    fitting = []
    if _peak(needs.streaming)[1] <= room:
        fitting.append(f"engine.kind=streaming needs {_gb(_peak(needs.streaming)[1])}")
    elif needs.streaming_parts:
        if _peak(needs.streaming_parts[1])[1] <= room:
            fitting.append("engine.kind=streaming with engine.experts=auto")
    elif _peak(needs.streaming_one_layer)[1] <= room:
        fitting.append(
            f"engine.kind=streaming without prefetch needs "
            f"{_gb(_peak(needs.streaming_one_layer)[1])}"
        )
    degrees = [n for n, of_rank in needs.tensor_parallel.items() if _peak(of_rank)[1] <= room]
    if degrees:
        least = min(degrees)
        peak = _gb(_peak(needs.tensor_parallel[least])[1])
        fitting.append(f"engine.tensor_parallel={least} needs {peak} on each of {least} devices")
    if fitting:
        return "What would fit: " + "; ".join(fitting) + "."
    least = min(
        _peak(needs.streaming_parts.get(1, needs.streaming_one_layer))[1],
        *(_peak(of_rank)[1] for of_rank in needs.tensor_parallel.values()),
    )
    return (
        f"Nothing would fit there: a device with {_gb(int(least / SHARE_OF_FREE_MEMORY))} free is "
        "the least. Fewer bytes are needed with a smaller engine.batch or "
        "calibration.window_length, or smaller sums (operator.name=ghost with "
        "operator.features=stream)."
    )


def _peak(by_stage: Mapping[str, int]) -> tuple[str, int]:
    stage = max(by_stage, key=lambda name: by_stage[name])
    return stage, by_stage[stage]


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
