"""How fast a machine is at what runs do: measured once (``probe.py``) and kept in a cache folder.

Legend: T tokens, C hidden width, F inner width of an MLP, Z regressors, N targets.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghost_dist.durable import fingerprint, json_bytes, write_bytes

FORMAT = 2
_STEEPEST = 3.0  # seconds grow at most with the cube of a matrix's size


@dataclass(frozen=True)
class Curve:
    """Seconds of one thing at growing sizes; between and beyond them a power law."""

    points: tuple[tuple[int, float], ...]
    """(size, seconds), ascending; at least one."""

    def at(self, size: int) -> float:
        """Seconds at a size: from the two nearest points, beyond the last with their slope."""
        if len(self.points) == 1:
            known, seconds = self.points[0]
            return float(seconds * (size / known) ** (_STEEPEST if size > known else 0.0))
        last = len(self.points) - 1
        above = next((i for i, (known, _) in enumerate(self.points) if known >= size), last)
        (a, at_a), (b, at_b) = self.points[max(above, 1) - 1], self.points[max(above, 1)]
        slope = math.log(at_b / at_a) / math.log(b / a)
        slope = min(_STEEPEST, max(1.0 if size > b else 0.0, slope))
        return float(at_b * (size / b) ** slope)


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, or how long one of something takes.

    A kind of layer missing in ``layer_s`` was too large to be tried: ``matmul`` says.
    """

    device: str
    read: float  # bytes/s past the page cache
    read_from: str
    load: float  # bytes/s from the page cache to checked weights
    load_tensor_s: float  # seconds of a tensor, however small
    to_device: float  # bytes/s from pinned host memory
    write: float  # bytes/s brought to the disk
    commit: float  # bytes/s of a range's sums into the store, and seconds of a range
    commit_s: float
    store_read: float  # bytes/s of sums read back and checked
    matmul: Mapping[str, float]  # FLOP/s by dtype at the model's shapes
    layer_s: Mapping[str, float]  # seconds per token by kind of layer
    forward_s: float  # seconds of a forward beside its layers
    head_s: float  # per token, as are the next two
    loss_s: float
    divergence_s: float
    products: Mapping[str, float]  # FLOP/s by kind of sums
    sums_s: Mapping[str, float]  # seconds per token beside the products
    fit: Mapping[str, Curve]  # seconds of fit_steps steps by Z, by kind of regressors
    step: Mapping[str, Curve]
    fit_steps: int
    process_s: float  # until a fresh process has imported its libraries
    measured_s: float


def cache_file(key: Mapping[str, Any]) -> Path:
    """Where rates measured under these circumstances are kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "ghost_dist" / "rates" / f"{fingerprint({'format': FORMAT, **key})[:32]}.json"


def stored_rates(key: Mapping[str, Any]) -> Rates | None:
    """Rates measured before under the same circumstances; None if there are none to be read."""
    try:
        tree = json.loads(cache_file(key).read_bytes())
        rates = dict(tree["rates"])
        for name in ("fit", "step"):
            rates[name] = {
                kind: Curve(tuple((int(size), float(s)) for size, s in curve["points"]))
                for kind, curve in rates[name].items()
            }
        return Rates(**rates)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # measured again then


def store_rates(key: Mapping[str, Any], rates: Rates) -> None:
    """Keep rates for later plans, with the circumstances in plain text."""
    path = cache_file(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, json_bytes({"key": dict(key), "rates": dataclasses.asdict(rates)}))
