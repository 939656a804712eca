"""Statistics of every candidate span in one pass, for the held-out residual after repair.

Legend: T tokens, C hidden width, r columns of the projection, P stops of one start, L layers.

:class:`PairCollector` keeps one gram per start. For a fixed number of layers there is one stop per
start, and the whole cross is kept: exact. For all pairs (start, stop) up to a length it keeps of
each pair only the cross with a random projection ``Y R`` of the stream entering ``stop``, see
docs/theory.md: only off-diagonal correlations of the residual's covariance S make its energy vary,
by about ``sqrt(2 / r) ||offdiag(S)|| / tr(S)`` relative to its value.

State at C = 8192, L = 80, r = 64: gram 512 MiB a start, 40 GiB over all starts; cross 4 MiB a
pair, 9.5 GiB for the 2420 pairs of at most 40 layers; once per fold. ``PairCollector`` may be given
some of the starts only, so that the starts are split over ranks or passes. Streams held: the last
``max_length`` + 1 boundaries of each window in flight. Work: T (2 C^2 + 2 P C r) FLOP a start.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ghost_dist.errors import ConfigError
from ghost_dist.spans import Span
from ghost_dist.statistics.moments import add_product, has_full_rate_float64
from ghost_dist.statistics.span_sums import Collector, FiniteCheck
from ghost_dist.statistics.sums import WHOLE, ColumnBlock, Sums, mirror_

FLUSH_TOKENS = 8192
"""Rows summed in float32 at a time, where products are not float64; windows are put together until
there are as many, whatever number of them went through the model at once."""

PROJECTION_COLUMNS = 64


def candidate_spans(
    num_layers: int,
    min_length: int,
    max_length: int,
    protect: Collection[int] = (),
) -> tuple[Span, ...]:
    """Every span of ``min_length`` to ``max_length`` layers without a protected one, sorted."""
    spans = tuple(
        Span(start, start + length)
        for start in range(num_layers)
        for length in range(min_length, min(max_length, num_layers - start, num_layers - 1) + 1)
        if not any(start <= layer < start + length for layer in protect)
    )
    if not spans:
        raise ConfigError(
            f"No span of {min_length} to {max_length} layers of the model's {num_layers} is free "
            f"of the {len(set(protect))} protected layers. Remove fewer layers, allow shorter "
            "spans (selection.max_spans), or protect fewer (selection.protect)."
        )
    return spans


@dataclass(frozen=True)
class PairMoments(Sums):
    """Sums of one start and all its stops over ``num_tokens`` rows; all tensors float64."""

    gram_CC: Tensor  # X'X of the stream entering start
    cross_CPr: Tensor  # X'Y R per stop, ascending
    sumsq_target_Pr: Tensor  # of the columns of Y R
    sumsq_y_P: Tensor  # ||Y||^2 and, below, ||Y - X||^2, exact
    sumsq_change_P: Tensor

    BY_COLUMNS: ClassVar[frozenset[str]] = frozenset({"gram_CC", "cross_CPr"})
    SYMMETRIC: ClassVar[frozenset[str]] = frozenset({"gram_CC"})


class PairCollector(Collector):
    """:class:`PairMoments` of every start from one pass.

    ``columns`` is r, None: no projection, r = C, exact. ``block``: columns of gram and cross to
    keep, where ranks hold the same rows.
    """

    def __init__(
        self,
        spans: Iterable[Span],
        hidden_size: int,
        device: torch.device,
        columns: int | None = PROJECTION_COLUMNS,
        block: ColumnBlock = WHOLE,
    ) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.stops: dict[int, tuple[int, ...]] = {}
        for span in sorted(spans):
            self.stops[span.start] = (*self.stops.get(span.start, ()), span.stop)
        self._projection_Cr = (
            None if columns is None else projection(hidden_size, columns).to(device)
        )
        columns = columns or hidden_size
        self._whole = block.count == 1
        self._kept_C, self._kept_r = block.of(hidden_size), block.of(columns)
        kept_c = self._kept_C.stop - self._kept_C.start
        kept_r = self._kept_r.stop - self._kept_r.start
        # Not of halves on a GPU: 2e-5 of the correlation scale is enough to choose among spans.
        in_halves = device.type == "cuda" and self._projection_Cr is None
        self._float64_products = has_full_rate_float64(device) and not in_halves
        self._sums = {
            start: PairMoments(
                0,
                zeros(hidden_size, kept_c),
                zeros(hidden_size, len(stops), kept_r),
                zeros(len(stops), columns),
                zeros(len(stops)),
                zeros(len(stops)),
            )
            for start, stops in self.stops.items()
        }
        self._num_tokens = dict.fromkeys(self.stops, 0)
        self._pending: dict[tuple[int, int], tuple[Tensor, list[Tensor]]] = {}
        self._waiting: dict[int, list[tuple[Tensor, list[Tensor]]]] = {s: [] for s in self.stops}
        self._finite = FiniteCheck()
        self.boundaries = tuple(sorted({*self.stops, *itertools.chain(*self.stops.values())}))

    def __call__(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        self._finite.note(boundary, window, stream_TC)
        starts = [start for start, stops in self.stops.items() if boundary in stops]
        if starts:
            wide = torch.float64 if self._float64_products else torch.float32
            target_Tr = stream_TC
            if self._projection_Cr is not None:
                target_Tr = stream_TC.to(wide) @ self._projection_Cr.to(wide)
            sumsq_target_r = _sumsq(target_Tr, wide, dim=0)
            sumsq_y = _sumsq(stream_TC, wide)
            for start in starts:
                sums, pair = self._sums[start], self.stops[start].index(boundary)
                x_TC, targets = self._pending[start, window]
                change_TC = stream_TC.to(wide) - x_TC.to(wide)
                sums.sumsq_change_P[pair] += _sumsq(change_TC, wide)
                sums.sumsq_target_Pr[pair] += sumsq_target_r
                sums.sumsq_y_P[pair] += sumsq_y
                targets.append(target_Tr[:, self._kept_r])
        if boundary in self.stops:
            self._pending[boundary, window] = (stream_TC, [])
        for start in starts:
            if boundary == self.stops[start][-1]:
                waiting = self._waiting[start]
                waiting.append(self._pending.pop((start, window)))
                if self._float64_products or sum(len(x) for x, _ in waiting) >= FLUSH_TOKENS:
                    self._add_products(start)

    def _add_products(self, start: int) -> None:
        """Gram, and the cross with all stops in one product, once a start's last stop has come."""
        sums, waiting = self._sums[start], self._waiting[start]
        if not waiting:
            return
        x_TC = torch.cat([x for x, _ in waiting])
        targets_TPr = torch.cat([torch.cat(targets, dim=1) for _, targets in waiting])
        waiting.clear()
        if self._float64_products:
            x_TC = x_TC.double()
        add = partial(
            add_product, float64_products=self._float64_products, flush_tokens=FLUSH_TOKENS
        )
        add(sums.gram_CC, x_TC, x_TC[:, self._kept_C])
        add(sums.cross_CPr.flatten(1), x_TC, targets_TPr)
        self._num_tokens[start] += x_TC.shape[0]

    def result(self) -> dict[str, Sums]:
        """Moments of every start (no copy) by :func:`start_key`; their stops are in ``stops``."""
        assert not self._pending, f"no last boundary came for {sorted(self._pending)}"
        self._finite.check()
        for start in self.stops:
            self._add_products(start)
            if self._whole:
                mirror_(self._sums[start].gram_CC)
        return {
            start_key(start): replace(sums, num_tokens=self._num_tokens[start])
            for start, sums in self._sums.items()
        }


def _sumsq(rows: Tensor, wide: torch.dtype, dim: int | None = None) -> Tensor:
    """Sum of squares, float64; on a GPU in one reading of the rows."""
    if wide == torch.float64:
        return rows.double().square().sum(dim)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=dim, dtype=wide)
    return norm.double().square()


def start_key(start: int) -> str:
    return f"start-{start}"


def projection(hidden_size: int, columns: int = PROJECTION_COLUMNS) -> Tensor:
    """R, (C, r) float64 on the CPU: independent signs over sqrt(r), the same in every process."""
    generator = torch.Generator().manual_seed(0)
    signs_Cr = torch.randint(0, 2, (hidden_size, columns), generator=generator) * 2 - 1
    return signs_Cr.double() / math.sqrt(columns)
