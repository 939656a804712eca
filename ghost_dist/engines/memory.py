"""What layers hold of a device, how much of them fits, and which engine runs a model.

The one model of bytes and the one choice, for the engine, ``plan`` and ``recover``. Of layers that
are read one by one, in this order: whole layers, the next one being read while one runs; layers
whose routed experts are held in parts; whole layers one at a time, without reading ahead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ghost_dist.devices import SHARE_OF_FREE_MEMORY
from ghost_dist.errors import ConfigError

EngineKind = Literal["resident", "tensor_parallel", "streaming"]
_PARTS_AT_ONCE = 2  # of experts: the next one is read when this one has been converted


@dataclass(frozen=True)
class Residency:
    """What of the layers is on the device at once."""

    experts: int | None = None  # routed ones of a part; None: layers are whole
    prefetch: bool = True  # the next layer, or part, is read while one runs


@dataclass(frozen=True)
class LayerBytes:
    """What takes memory of the device while layers run, in bytes."""

    layer: int  # the largest
    embeddings: int
    head: int  # with its logits; 0 where it is not run
    batch: int
    rest: int = 0  # of the largest layer with routed experts, without them
    beside: int = 0  # the largest of all layers without routed experts
    expert: int = 0
    count: int = 0  # routed experts of the layer that has most; 0: none that can be held in parts
    pairs: int = 0  # of all pairs of token and expert of a batch

    def weights(self, held: Residency) -> int:
        if held.experts is not None:
            ahead = max(self.beside, self.head)
            running = self.rest + ahead + _PARTS_AT_ONCE * held.experts * self.expert
            return max(self.embeddings + self.rest, running)
        twice = self.layer if self.count else 0  # experts are stacked: for a moment they are twice
        if held.prefetch:  # the first layer beside the embeddings, the head beside the last
            return max(self.embeddings, self.layer, self.head) + self.layer + twice
        return max(self.embeddings, self.layer + twice, self.head)

    def of_batch(self, held: Residency) -> int:
        return self.batch if held.experts is None else max(self.batch, self.pairs)

    def at_once(self, held: Residency) -> int:
        return self.weights(held) + self.of_batch(held)


def choose_residency(
    fits: Callable[[Residency], bool], count: int, experts: int | Literal["auto"] = "auto"
) -> Residency | None:
    """The first of what can be held that fits; None if nothing does.

    ``count``: routed experts of a layer that can be held in parts; 0: none. A number of ``experts``
    is taken as it is, whether it fits or not.
    """
    whole = Residency() if fits(Residency()) else Residency(prefetch=False)
    if experts != "auto":
        return Residency(experts) if experts < count else whole
    if whole.prefetch:
        return whole
    parts = next((n for n in range(count - 1, 0, -1) if fits(Residency(n))), None)
    if parts is not None:
        return Residency(even_part(count, parts))
    return whole if fits(whole) else None


def even_part(count: int, fitting: int) -> int:
    """Experts of a part where ``fitting`` fit: the fewest parts, two at least, of like sizes."""
    return -(-count // max(2, -(-count // fitting)))


@dataclass(frozen=True)
class DeviceNeeds:
    """Peak bytes on one device, by stage, for each engine."""

    resident: Mapping[str, int]
    tensor_parallel: Mapping[int, Mapping[str, int]]  # by degree
    degree: int  # configured; a key of tensor_parallel
    streaming: Mapping[Residency, Mapping[str, int]]
    largest_layer: int  # alone, for the message

    @property
    def experts(self) -> int:
        """Routed experts of a layer that can be held in parts; 0: none."""
        parts = [held.experts for held in self.streaming if held.experts is not None]
        return max(parts) + 1 if parts else 0


@dataclass(frozen=True)
class EngineChoice:
    kind: EngineKind
    reason: str  # with the bytes that decided
    device_bytes: Mapping[str, int]
    prefetch: bool = True  # streaming: whether the next layer is read while one is computed
    experts: int | None = None  # streaming: routed ones of a layer held at once; None: all
    fits: bool = True  # false where the model has to be held whole, but does not fit


def choose_engine(
    kind: EngineKind | Literal["auto"],
    *,
    on_cluster: bool,
    needs: DeviceNeeds,
    free_bytes: int,
    where: str,
    experts: int | Literal["auto"] = "auto",
    whole: str | None = None,
) -> EngineChoice:
    """The engine of a run: the configured one if it fits, with ``auto`` the first that fits.

    ``auto``: resident if everything fits (on a cluster, only where ranks do not share the layers by
    configuration); else tensor_parallel on a cluster; else streaming. ``whole`` says what needs the
    whole model, which ``auto`` in one process then holds even where it does not fit.
    """
    room = int(free_bytes * SHARE_OF_FREE_MEMORY)
    has = f"{where} has {_gb(free_bytes)} free, of which {SHARE_OF_FREE_MEMORY:.0%} may be filled"
    shared = needs.tensor_parallel[needs.degree]
    if kind == "resident" or (kind == "auto" and not (on_cluster and needs.degree > 1)):
        stage, peak = _peak(needs.resident)
        why = "the whole model fits on one device: at most"
        fits = peak <= room
        if not fits:
            why = f"{whole} needs the model whole: it is loaded so, although"
        if fits or (whole is not None and kind == "auto" and not on_cluster):
            reason = f"{why} {_gb(peak)} are needed ({stage}), and {has}"
            return EngineChoice("resident", reason, needs.resident, fits=fits)
        if kind == "resident":
            raise ConfigError(
                f"engine.kind=resident needs {_gb(peak)} on one device ({stage}), but {has}. "
                + _what_would_fit(needs, room)
            )
    if kind == "tensor_parallel" or (kind == "auto" and on_cluster):
        stage, peak = _peak(shared)
        if peak <= room:
            why = f"{needs.degree} ranks share every layer: at most {_gb(peak)} are needed on each"
            return EngineChoice("tensor_parallel", f"{why} ({stage}), and {has}", shared)
        raise ConfigError(
            f"engine.tensor_parallel={needs.degree} needs {_gb(peak)} on each rank ({stage}), but "
            f"{has}. " + _what_would_fit(needs, room)
        )
    return _streaming(needs, experts, room, kind, has)


def _streaming(
    needs: DeviceNeeds, experts: int | Literal["auto"], room: int, kind: str, has: str
) -> EngineChoice:
    """Layer after layer, with what is held at once as the engine itself will choose it."""
    peaks = {held: _peak(by_stage)[1] for held, by_stage in needs.streaming.items()}
    count = needs.experts
    held = choose_residency(lambda held: peaks[held] <= room, count, experts)
    held = held or (Residency(1) if count else Residency(prefetch=False))
    stage, peak = _peak(needs.streaming[held])
    if peak > room:
        largest = _gb(needs.largest_layer)
        message = (  # whole, as the FAQ quotes it
            f"The model does not fit: even one layer at a time (engine.kind=streaming) needs "
            f"{_gb(peak)} ({stage}; the largest layer alone is {largest}), but {has}. "
        )
        if held.experts is not None:
            message = (
                f"The model does not fit: even {held.experts} of {count} routed experts of a "
                f"layer at a time (engine.kind=streaming, engine.experts) need {_gb(peak)} "
                f"({stage}; the largest layer alone is {largest}), but {has}. "
            )
        raise ConfigError(message + _what_would_fit(needs, room))
    if held.experts is not None:
        what = f"layers with {held.experts} of {count} routed experts at a time need"
        stage += f"; the largest layer alone is {_gb(needs.largest_layer)}"
    elif held.prefetch:
        what = f"{'three' if count else 'two'} layers at a time need"
    else:
        what = "one layer at a time, without prefetch, needs"
    whole = f"the whole model would need {_gb(_peak(needs.resident)[1])}"
    return EngineChoice(
        "streaming",
        f"{whole if kind == 'auto' else 'as configured'}; {what} {_gb(peak)} ({stage}), and {has}",
        needs.streaming[held],
        prefetch=held.prefetch,
        experts=held.experts,
    )


def _what_would_fit(needs: DeviceNeeds, room: int) -> str:
    fitting = []
    streaming = {held: _peak(by_stage)[1] for held, by_stage in needs.streaming.items()}
    sharing = {n: _peak(of_rank)[1] for n, of_rank in needs.tensor_parallel.items()}
    held = choose_residency(lambda held: streaming[held] <= room, needs.experts)
    if held is not None and held.experts is not None:
        fitting.append("engine.kind=streaming with engine.experts=auto")
    elif held is not None:
        way = "" if held.prefetch else " without prefetch"
        fitting.append(f"engine.kind=streaming{way} needs {_gb(streaming[held])}")
    if degrees := [n for n, peak in sharing.items() if peak <= room]:
        n = min(degrees)
        needed = _gb(sharing[n])
        fitting.append(f"engine.tensor_parallel={n} needs {needed} on each of {n} devices")
    if fitting:
        return "What would fit: " + "; ".join(fitting) + "."
    least = min(*streaming.values(), *sharing.values())
    return (
        f"Nothing would fit there: a device with {_gb(int(least / SHARE_OF_FREE_MEMORY))} free is "
        "the least. Fewer bytes are needed with a smaller engine.batch or "
        "calibration.window_length, or smaller sums (operator.name=ghost with "
        "operator.features=stream)."
    )


def _peak(by_stage: Mapping[str, int]) -> tuple[str, int]:
    return max(by_stage.items(), key=lambda item: item[1], default=("nothing", 0))


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
