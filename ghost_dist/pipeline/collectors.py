"""Which collector a pass over the windows feeds: plain values that travel to where the model is.

The same description makes the collector of one process and those of every rank of a cluster, each
of which keeps its block of columns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.devices import mark
from ghost_dist.engines.resident import Engine
from ghost_dist.pipeline.cost import Cost, product_bytes
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import (
    Collector,
    Regressors,
    SpanCollector,
    moments_bytes,
    moments_flops,
    num_regressors,
    stored_bytes,
    sums_key,
)
from ghost_dist.statistics.sums import WHOLE, ColumnBlock, Sums


@dataclass(frozen=True)
class RangeTimes:
    """Seconds of the device: running the model, and making sums of what it pushes.

    On a CUDA device both are of its stream: work that the host queued later than the device could
    have begun it counts for whichever it belongs to.
    """

    forward_s: float
    sums_s: float

    @staticmethod
    def told(of_ranks: Sequence[RangeTimes]) -> dict[str, list[float]]:
        """As events have them: of every rank."""
        return {
            "forward_s": [round(times.forward_s, 3) for times in of_ranks],
            "sums_s": [round(times.sums_s, 3) for times in of_ranks],
        }


class Stopwatch:
    """Adds up intervals of a device's time; on CUDA by events, so that nothing is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._laps: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        if self._cuda is None:
            return time.perf_counter()
        return mark(self._cuda, timing=True)

    @contextlib.contextmanager
    def lap(self) -> Iterator[None]:
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


class TimedCollector(Collector):
    """A collector and the time that it takes; made when the first stream comes.

    Until then its sums take no memory, which layers that are read one by one may need.
    """

    def __init__(self, collectors: Collectors, device: torch.device, block: ColumnBlock) -> None:
        self.watch = Stopwatch(device)
        self.boundaries, self.mlp_layers = wanted(collectors)
        self._make = partial(collectors.collector, device, block)

    @cached_property
    def _collector(self) -> Collector:
        with torch.inference_mode(mode=False):  # sums are changed where no model is run
            return self._make()

    def __call__(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        with self.watch.lap():
            self._collector(boundary, window, stream_TC)

    def take_mlp(self, layer: int, window: int, input_TF: Tensor, product_TC: Tensor) -> None:
        with self.watch.lap():
            self._collector.take_mlp(layer, window, input_TF, product_TC)

    def result(self) -> Mapping[str, Sums]:
        with self.watch.lap():
            return self._collector.result()


if TYPE_CHECKING:
    from ghost_dist.pipeline.run_shape import RunShape


class Collectors(Protocol):
    """What is to be collected; can be pickled."""

    @property
    def entries(self) -> dict[str, str]:
        """Names of its sums, and their kinds in a store."""

    def collector(self, device: torch.device, block: ColumnBlock) -> Collector:
        """One for the windows of a range; its sums are those of the plan."""


@dataclass(frozen=True)
class SpanCollectors:
    """Sums of chosen spans."""

    samples: Sequence[tuple[Span, Regressors]]
    architecture: Architecture

    @property
    def entries(self) -> dict[str, str]:
        return {sums_key(span, kind): "moments" for span, kind in self.samples}

    def collector(self, device: torch.device, block: ColumnBlock) -> Collector:
        return SpanCollector(
            self.samples,
            self.architecture.hidden_size,
            device,
            inner_size=self.architecture.inner_sizes,
            norm_eps=self.architecture.norm_eps,
            block=block,
        )

    def stored_bytes(self, blocks: int) -> int:
        width, inner_sizes = self.architecture.hidden_size, self.architecture.inner_sizes
        return sum(
            stored_bytes(kind, width, inner_sizes.get(span.start - 1, 0), blocks)
            for span, kind in self.samples
        )

    def cost(self, run: RunShape) -> Cost:
        sizes, inputs, width = run.sizes, run.inputs, run.sizes.hidden_size
        streams_bytes = len(run.spans) * sizes.stream_bytes(run.batch_tokens)
        cost = pass_cost(self, run, inputs.num_ranges, streams_bytes)
        cost.commit_bytes = inputs.num_ranges * self.stored_bytes(inputs.config.engine.ranks)
        for span, kind in self.samples:
            inner = run.inner_size(span)
            cost.sums_bytes += moments_bytes(kind, width, inner)
            regressors = num_regressors(kind, width, inner)
            cost.sums[kind] += run.num_tokens * moments_flops(regressors, width)
            product = product_bytes(regressors, width, run.window_length)
            cost.product_bytes = max(cost.product_bytes, product)
            if kind == "joint":
                cost.batch_bytes += run.batch_tokens * (4 * width + inner * sizes.itemsize)
        return cost


def sums_of_range(
    engine: Engine,
    tokens: Tokens,
    windows: Sequence[int],
    collectors: Collectors,
    advance: Callable[[int], None],
    block: ColumnBlock = WHOLE,
) -> tuple[Mapping[str, Sums], RangeTimes]:
    """Run the windows of one range, from zero; what a store commits as a whole."""
    collector = TimedCollector(collectors, engine.device, block)
    began = collector.watch.now()
    engine.run(tokens, windows, collector, advance)
    sums = collector.result()
    total_s = collector.watch.until_now(began)
    sums_s = collector.watch.seconds()
    return sums, RangeTimes(forward_s=total_s - sums_s, sums_s=sums_s)


def pass_cost(collectors: Collectors, run: RunShape, ranges: int, batch_bytes: int) -> Cost:
    """Of a pass over the windows, but for the sums that are made on the way."""
    sizes, tokens, architecture = run.sizes, run.num_tokens, run.inputs.architecture
    below = last_boundary(collectors)
    cost = Cost(
        below=below,
        batch=run.inputs.batch,
        length=run.window_length,
        ranges=ranges,
        batch_bytes=batch_bytes,
        running_bytes=sizes.stream_bytes(tokens),
        kept_bytes=tokens * kept_numbers(architecture, collectors) * sizes.itemsize,
    )
    cost.pass_tokens(range(below), tokens)
    return cost


def wanted(collectors: Collectors) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Boundaries and MLP layers that are wanted; a collector without storage says so."""
    sink = collectors.collector(torch.device("meta"), WHOLE)
    return sink.boundaries, sink.mlp_layers


def last_boundary(collectors: Collectors) -> int:
    """Layers that the engine must have."""
    return wanted(collectors)[0][-1]


def kept_numbers(architecture: Architecture, collectors: Collectors) -> int:
    """Numbers per token of the rows that are kept until sums are taken (offloaded)."""
    boundaries, mlp_layers = wanted(collectors)
    streams = len(boundaries) + len(mlp_layers)
    inner = sum(architecture.inner_sizes[layer] for layer in mlp_layers)
    return streams * architecture.hidden_size + inner
