"""How fast a machine is at what runs do: measured once (``probe.py``) and kept."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghost_dist.durable import fingerprint, json_bytes, write_bytes

FORMAT = 4


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second."""

    device: str
    read: float  # bytes of the checkpoint past the page cache
    read_from: str
    load: float  # bytes from the page cache to the device, checked
    write: float  # bytes brought to the disk
    # FLOP: by kind of layer, "head" with the scores, by kind of sums, by dtype of plain products
    products: Mapping[str, float]
    factors: Mapping[str, float]  # FLOP of fits, by kind of regressors
    process_s: float  # until a fresh process has imported its libraries
    measured_s: float


def cache_file(key: Mapping[str, Any]) -> Path:
    """Where rates measured under these circumstances are kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "ghost_dist" / "rates" / f"{fingerprint({'format': FORMAT, **key})[:32]}.json"


def stored_rates(key: Mapping[str, Any]) -> Rates | None:
    """Rates measured before under the same circumstances; None if there are none to be read."""
    try:
        return Rates(**json.loads(cache_file(key).read_bytes())["rates"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # measured again then


def store_rates(key: Mapping[str, Any], rates: Rates) -> None:
    """Keep rates for later plans, with the circumstances in plain text."""
    path = cache_file(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, json_bytes({"key": dict(key), "rates": dataclasses.asdict(rates)}))
