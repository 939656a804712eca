"""What the driver and the ranks of replicas tell each other, besides outcomes of fits."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ghost_dist import __version__
from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.engines.tensor_parallel import Backend
from ghost_dist.pipeline.collectors import Collectors

COMPARED = ("torch", "transformers", "zarr", "numpy", "ray")
"""Libraries whose versions must be the same on all nodes, besides ghost_dist and Python."""


@dataclass(frozen=True)
class EngineSpec:
    """What every rank of every replica loads."""

    path: Path
    model_fingerprint: str
    architecture: Architecture
    num_layers: int  # layers to load; 0: none, the rank only fits
    dtype: torch.dtype
    device: str
    batch: int
    degree: int  # ranks of a replica
    kind: Literal["resident", "tensor_parallel", "streaming"]
    """How the ranks run the layers; resident ones have degree 1."""
    experts: int | Literal["auto"]  # as ``engine.experts``
    window_length: int
    range_windows: int  # of the largest range
    backend: Backend
    threads: int
    timeout_s: float  # of a collective: what a rank waits for the others


@dataclass(frozen=True)
class Work:
    """One store to fill; the same for all leases of a stage."""

    store: Path
    plan_fingerprint: str
    tokens: Tokens
    collectors: Collectors
    keep: int | None
    """Folds of which the rank keeps the running sums of committed ranges; None: it keeps none."""


@dataclass(frozen=True)
class FitWork:
    """One store to fit spans from."""

    store: Path
    plan_fingerprint: str
    folds: int
    room: int  # bytes of the largest fit on a GPU; 0: the driver has none, so a rank sees itself


@dataclass(frozen=True)
class Place:
    node: str
    address: str
    port: int  # free when it was asked for
    pid: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Loaded:
    parameter_bytes: int
    conformance: float | None
    """Largest relative difference of the small random model, sharded against unsharded."""


@dataclass(frozen=True)
class Heartbeat:
    """The attempt or task at hand, and how much of it (tokens, fits, ranges, arrays) is done."""

    attempt: str
    done: int


def versions() -> dict[str, str]:
    """What must be the same wherever a run computes."""
    found = {"python": platform.python_version().rpartition(".")[0], "ghost_dist": __version__}
    return {**found, **{name: importlib.metadata.version(name) for name in COMPARED}}
