"""How much of a streamed model is on the device at once, by what fits there.

In this order: whole layers, the next one being read while one runs; layers whose routed experts are
held in parts; whole layers one at a time, each read when the one before it is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ghost_dist.engines.expert_parts import bytes_in_parts, cannot_be_split, even_part
from ghost_dist.errors import ConfigError


@dataclass(frozen=True)
class LayerBytes:
    """What weights take on the device.

    Attributes
    ----------
    with_next
        At most while whole layers run: one, the next one, and what a conversion holds twice.
    alone
        The same of one layer at a time.
    rest, beside, expert
        As for ``expert_parts.bytes_in_parts``; 0 for a model without routed experts.
    count
        Routed experts of the layer that has most; 0: none.
    family, problem
        Name of the model's, and why its experts cannot be held in parts; None: they can.
    """

    with_next: int
    alone: int
    rest: int = 0
    beside: int = 0
    expert: int = 0
    count: int = 0
    family: str = ""
    problem: str | None = None

    def at_once(self, held: Held) -> int:
        """Of weights, at most."""
        if held.experts is not None:
            return bytes_in_parts(self.rest, self.beside, self.expert, held.experts)
        return self.with_next if held.reads_ahead else self.alone


@dataclass(frozen=True)
class Held:
    """What is on the device at once.

    Attributes
    ----------
    experts
        Routed experts of a part; None: layers are whole.
    reads_ahead
        Whether the next layer, or part, is read while one runs.
    """

    experts: int | None = None
    reads_ahead: bool = True


@dataclass(frozen=True)
class Room:
    """What the device has for weights, and what else is there.

    Attributes
    ----------
    whole, parts
        Bytes that weights may take where layers are whole, and where their experts are in parts.
    batch, batch_with_pairs
        Bytes of a batch in both cases, for the message.
    batch_tokens, device
        For the message.
    """

    whole: int
    parts: int
    batch: int
    batch_with_pairs: int
    batch_tokens: int
    device: str


def fit_layers(
    layers: LayerBytes, room: Room, experts: int | Literal["auto"], *, may_split: bool = True
) -> Held:
    """What to hold at once.

    Parameters
    ----------
    layers, room
        What is needed and what there is.
    experts
        ``engine.experts``. A number is taken as it is, whether it fits or not.
    may_split
        Whether auto may hold experts in parts.

    Raises
    ------
    ConfigError
        With auto, if nothing fits.
    UnsupportedArchitectureError
        If experts would have to be in parts, but cannot be.
    """
    if experts != "auto":
        if experts < layers.count:
            if layers.problem:
                raise cannot_be_split(layers.family, layers.problem)
            return Held(experts)
        return Held(reads_ahead=layers.with_next <= room.whole)
    if layers.with_next <= room.whole:
        return Held()
    split = may_split and layers.count > 0 and layers.problem is None
    if split:
        none = bytes_in_parts(layers.rest, layers.beside, layers.expert, 0)
        fitting = (room.parts - none) // bytes_in_parts(0, 0, layers.expert, 1)
        if fitting >= 1:
            return Held(even_part(layers.count, fitting))
    if layers.alone <= room.whole:
        return Held(reads_ahead=False)
    if layers.problem:
        raise cannot_be_split(layers.family, layers.problem)
    raise ConfigError(_nothing_fits(layers, room, split=split))


def _nothing_fits(layers: LayerBytes, room: Room, *, split: bool) -> str:
    if split:
        least, left, batch = layers.at_once(Held(1)), room.parts, room.batch_with_pairs
        what = "one routed expert at a time, with the rest of its layer and what is read ahead,"
    else:
        least, left, batch = layers.alone, room.whole, room.batch
        what = "one whole layer at a time"
    return (
        f"The layers do not fit {room.device}: {what} takes {_gb(least)}, a batch of "
        f"{room.batch_tokens} tokens {_gb(batch)}, but only {_gb(max(0, left + batch))} "
        "may be filled. Take a smaller engine.batch, fewer or shorter calibration.windows, or a "
        "device with more memory."
    )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
