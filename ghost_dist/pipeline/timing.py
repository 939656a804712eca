"""How long the forward and the sums of a range took on the device, waited for once, at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghost_dist.devices import mark
from ghost_dist.statistics.span_sums import Collector
from ghost_dist.statistics.sums import Sums


@dataclass(frozen=True)
class RangeTimes:
    """Seconds of the device: running the model, and making sums of what it pushes.

    On a CUDA device both are of its stream: work that the host queued later than the device could
    have begun it counts for whichever it belongs to.
    """

    forward_s: float
    sums_s: float


class Stopwatch:
    """Adds up intervals of a device's time; on CUDA by events, so that nothing is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._laps: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        """A point in the device's time."""
        if self._cuda is None:
            return time.perf_counter()
        return mark(self._cuda, timing=True)

    @contextlib.contextmanager
    def lap(self) -> Iterator[None]:
        """An interval that counts."""
        began = self.now()
        yield
        self._laps.append((began, self.now()))

    def until_now(self, began: Any) -> float:
        """Seconds since a point; waits for the device."""
        ended = self.now()
        if self._cuda is not None:
            ended.synchronize()
        return self._between(began, ended)

    def seconds(self) -> float:
        """Sum of the intervals, once :meth:`until_now` has waited for them."""
        return sum(self._between(*lap) for lap in self._laps)

    def _between(self, began: Any, ended: Any) -> float:
        if self._cuda is None:
            return float(ended - began)
        return float(began.elapsed_time(ended)) / 1000


class TimedCollector:
    """A collector, each call of which is an interval of a stopwatch."""

    def __init__(self, collector: Collector, watch: Stopwatch) -> None:
        self._collector, self._watch = collector, watch
        self.boundaries, self.mlp_layers = collector.boundaries, collector.mlp_layers

    def __call__(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        """As the collector's."""
        with self._watch.lap():
            self._collector(boundary, window, stream_TC)

    def take_mlp(self, layer: int, window: int, input_TF: Tensor, product_TC: Tensor) -> None:
        """As the collector's."""
        with self._watch.lap():
            self._collector.take_mlp(layer, window, input_TF, product_TC)

    def result(self) -> dict[str, Sums]:
        """As the collector's."""
        with self._watch.lap():
            return self._collector.result()
