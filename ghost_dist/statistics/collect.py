"""Turns a flow of boundary streams into moments and scores, one pass whatever the number of spans.

An engine pushes ``(boundary, window, stream)``; within a window boundaries ascend, across windows
any interleaving is allowed. Collectors never wait for the device: whether a stream was finite is
noted on the device and asked for once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ghost_dist.errors import NonFiniteActivationError
from ghost_dist.spans import Span
from ghost_dist.statistics.moments import Moments, MomentsAccumulator


class SpanCollector:
    """Moments of several spans from one pass; call it with each boundary stream.

    Holds a stream only from a span's start to its stop: per window in flight and span T x C
    numbers of the compute dtype.
    """

    def __init__(self, spans: Iterable[Span], hidden_size: int, device: torch.device) -> None:
        self._accumulators = {span: MomentsAccumulator(hidden_size, device) for span in spans}
        self._pending: dict[tuple[Span, int], Tensor] = {}
        self._finite = _FiniteCheck()

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Boundaries that the engine must push, ascending."""
        return tuple(sorted({b for span in self._accumulators for b in (span.start, span.stop)}))

    def __call__(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        """Take the stream of one window at one boundary, shape (T, C)."""
        self._finite.note(boundary, window, stream_TC)
        for span, accumulator in self._accumulators.items():
            if boundary == span.stop:
                accumulator.add(self._pending.pop((span, window)), stream_TC)
            if boundary == span.start:
                self._pending[span, window] = stream_TC

    def result(self) -> dict[Span, Moments]:
        """Moments of every span.

        Raises
        ------
        NonFiniteActivationError
            If any stream held NaN or Inf; names the first layer and window.
        """
        assert not self._pending, f"no stop boundary came for {sorted(self._pending)}"
        self._finite.check()
        return {span: a.result() for span, a in self._accumulators.items()}


class CosineCollector:
    """Sum over tokens of ``cos(stream_b, stream_{b+n})`` for every start ``b``, in one pass.

    The criterion of LLM-Streamline (arXiv 2403.19135): per token, over the hidden width, in
    float32; every start from 0 to L - n counts, including a span that ends at the last layer.
    Holds the last n + 1 streams of each window in flight.
    """

    def __init__(self, num_layers: int, remove: int, device: torch.device) -> None:
        self._remove = remove
        self._num_layers = num_layers
        self._sums = torch.zeros(num_layers - remove + 1, dtype=torch.float64, device=device)
        self._streams: dict[tuple[int, int], Tensor] = {}
        self._finite = _FiniteCheck()
        self._num_tokens = 0

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Every boundary, 0 to L."""
        return tuple(range(self._num_layers + 1))

    def __call__(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        """Take the stream of one window at one boundary, shape (T, C)."""
        self._finite.note(boundary, window, stream_TC)
        stream_TC = stream_TC.float()
        start = boundary - self._remove
        if start >= 0:
            earlier_TC = self._streams.pop((start, window))
            cosine_T = torch.nn.functional.cosine_similarity(earlier_TC, stream_TC, dim=1)
            self._sums[start] += cosine_T.double().sum()
        if boundary + self._remove <= self._num_layers:
            self._streams[boundary, window] = stream_TC
        if boundary == 0:
            self._num_tokens += stream_TC.shape[0]

    def result(self) -> tuple[float, ...]:
        """Mean cosine of every start; the index is the start.

        Raises
        ------
        NonFiniteActivationError
            If any stream held NaN or Inf.
        """
        self._finite.check()
        return tuple((self._sums / self._num_tokens).tolist())


class _FiniteCheck:
    """Remembers on the device whether each stream was finite; reads it back once."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, int]] = []
        self._flags: list[Tensor] = []

    def note(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        self._seen.append((boundary, window))
        # |x| sums to Inf or NaN exactly if an entry is, unless 3.4e38 / T is reached by right
        # numbers, which no model survives; far cheaper than a mask of T x C flags.
        self._flags.append(stream_TC.float().abs().sum())

    def check(self) -> None:
        if not self._flags:
            return
        finite = torch.isfinite(torch.stack(self._flags))
        if not bool(finite.all()):
            bad = [seen for seen, ok in zip(self._seen, finite.tolist(), strict=True) if not ok]
            raise NonFiniteActivationError(*min(bad))
