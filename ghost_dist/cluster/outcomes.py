"""Outcomes of fits as they travel through Ray's object store: as NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.pipeline.fitting import Fitted, Outcome
from ghost_dist.solver.least_squares import Fit


@dataclass(frozen=True)
class SentOutcome:
    """A repair, its fit and the folds of it, or the error."""

    parts: dict[str, np.ndarray[Any, np.dtype[Any]]]
    norm_eps: float
    fit: Fit | None
    folds: frozenset[int]
    error: Any = None


def send(outcome: Outcome) -> SentOutcome:
    """As it travels; the repair is on the CPU."""
    if isinstance(outcome, Exception):
        return SentOutcome({}, 0.0, None, frozenset(), outcome)
    parts = {name: part.numpy() for name, part in outcome.repair.parts().items()}
    return SentOutcome(parts, outcome.repair.norm_eps, outcome.fit, outcome.folds)


def receive(sent: SentOutcome) -> Outcome:
    """Inverse of :func:`send`: the same bits and strides, in memory of this process."""
    if sent.error is not None:
        error: Outcome = sent.error
        return error
    parts = {name: torch.from_numpy(part.copy(order="K")) for name, part in sent.parts.items()}
    return Fitted(Repair.from_parts(parts, sent.norm_eps), sent.fit, sent.folds)
