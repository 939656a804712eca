"""Turns a flow of boundary streams into the sums of several spans, in one pass.

Within a window boundaries ascend, across windows any interleaving is allowed. Collectors never wait
for the device: whether a stream was finite is noted there and asked for once, at the end. And what
the sums cost, from shapes alone.

Legend: C hidden width, F inner width of an MLP, Z regressors.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ghost_dist.devices import arrived, mark
from ghost_dist.errors import NonFiniteActivationError
from ghost_dist.spans import Span
from ghost_dist.statistics.moments import BLOCK_COLUMNS, Moments, MomentsAccumulator, norm_features
from ghost_dist.statistics.sums import WHOLE, ColumnBlock, Sums, num_numbers

Regressors = Literal["stream", "stream+norm", "joint"]
"""Which sums of a span are taken. ``stream``: Z = x; ``stream+norm``: Z = [x, rmsnorm(x)];
``joint``: Z = [A, H], what enters ``start`` taken apart at the down_proj before it."""
_FLOAT64_BYTES = 8


def num_regressors(regressors: Regressors, hidden_size: int, inner_size: int) -> int:
    """Z of one kind of moments."""
    widths = {"stream": hidden_size, "stream+norm": 2 * hidden_size}
    return widths.get(regressors, hidden_size + inner_size)


def moments_bytes(regressors: Regressors, hidden_size: int, inner_size: int) -> int:
    z, c = num_regressors(regressors, hidden_size, inner_size), hidden_size
    return (z * z + z * c + z + 2 * c) * _FLOAT64_BYTES


def stored_bytes(regressors: Regressors, hidden_size: int, inner_size: int, blocks: int) -> int:
    """The same in the store, which keeps blocks of columns, or of one block half of the gram."""
    z = num_regressors(regressors, hidden_size, inner_size)
    saved = z**2 - num_numbers(z) if blocks == 1 else 0
    return moments_bytes(regressors, hidden_size, inner_size) - saved * _FLOAT64_BYTES


def moments_flops(num_regressors: int, num_targets: int) -> int:
    """FLOPs per token of gram and cross, about Z^2 + 2 Z C: half of the gram is not computed."""
    z, c = num_regressors, num_targets
    widths = [min(BLOCK_COLUMNS, z - first) for first in range(0, z, BLOCK_COLUMNS)]
    gram = sum(rows * sum(widths[: i + 1]) for i, rows in enumerate(widths))
    return 2 * gram + 2 * z * c


class Collector:
    """Takes streams of an engine, and ends as named sums.

    Boundaries of a window ascend, windows come in any order. Boundary b is the stream entering
    layer b; the last one is what the final norm would receive.
    """

    boundaries: tuple[int, ...]  # that must be pushed, ascending
    mlp_layers: tuple[int, ...] = ()  # whose down_proj must be, between their boundary and the next

    def __call__(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        """Take one window's stream (T, C), on the engine's device, which may be kept."""
        raise NotImplementedError

    def take_mlp(self, layer: int, window: int, input_TF: Tensor, product_TC: Tensor) -> None:
        """Take the input H (T, F) of a layer's down_proj and ``H @ down`` (T, C), without bias."""
        raise NotImplementedError

    def result(self) -> Mapping[str, Sums]:
        raise NotImplementedError


def sums_key(span: Span, kind: Regressors) -> str:
    """Name of the sums of a span in a store, such as ``11-18/joint``."""
    return f"{span.start}-{span.stop}/{kind}"


class SpanCollector(Collector):
    """Sums of several spans from one pass; ``block``: the columns of the moments to keep.

    Holds a stream only from a span's start to its stop: per window in flight and span T x C numbers
    of the compute dtype, and T x (C + F) more for ``joint``; ``inner_size``: F by layer.
    """

    def __init__(
        self,
        samples: Iterable[tuple[Span, Regressors]],
        hidden_size: int,
        device: torch.device,
        *,
        inner_size: Mapping[int, int] | None = None,
        norm_eps: float = 0.0,
        block: ColumnBlock = WHOLE,
    ) -> None:
        self._kinds: dict[Span, list[Regressors]] = {}
        self._accumulators: dict[str, MomentsAccumulator] = {}
        for span, kind in samples:
            self._kinds.setdefault(span, []).append(kind)
            inner = (inner_size or {})[span.start - 1] if kind == "joint" else 0
            width = num_regressors(kind, hidden_size, inner)
            self._accumulators[sums_key(span, kind)] = MomentsAccumulator(
                width, hidden_size, device, block=block
            )
        self._norm_eps = norm_eps
        self._mlp_spans = [span for span, kinds in self._kinds.items() if "joint" in kinds]
        self._mlp: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._pending: dict[tuple[Span, int], tuple[Tensor, tuple[Tensor, Tensor] | None]] = {}
        self._finite = FiniteCheck()
        self.boundaries = tuple(sorted({b for s in self._kinds for b in (s.start, s.stop)}))
        self.mlp_layers = tuple(sorted({span.start - 1 for span in self._mlp_spans}))

    def take_mlp(self, layer: int, window: int, input_TF: Tensor, product_TC: Tensor) -> None:
        self._mlp[layer, window] = (input_TF, product_TC)

    def __call__(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        self._finite.note(boundary, window, stream_TC)
        for span, kinds in self._kinds.items():
            if boundary == span.stop:
                x_TC, parts = self._pending.pop((span, window))
                for kind in kinds:
                    self._add(span, kind, x_TC, parts, stream_TC)
        parts = None
        if (boundary - 1, window) in self._mlp:
            input_TF, product_TC = self._mlp.pop((boundary - 1, window))
            # A: the stream without that product. In float32 (or wider): it is no bf16 number.
            wide = torch.promote_types(stream_TC.dtype, torch.float32)
            parts = (stream_TC.to(wide) - product_TC.to(wide), input_TF)
        for span in self._kinds:
            if boundary == span.start:
                joint = parts if span in self._mlp_spans else None
                self._pending[span, window] = (stream_TC, joint)

    def _add(
        self,
        span: Span,
        kind: Regressors,
        x_TC: Tensor,
        parts: tuple[Tensor, Tensor] | None,
        y_TC: Tensor,
    ) -> None:
        if kind == "joint":
            assert parts is not None, f"no down_proj input came before boundary {span.start}"
            regressors: tuple[Tensor, ...] = parts
        elif kind == "stream+norm":
            regressors = norm_features(x_TC, self._norm_eps)
        else:
            regressors = (x_TC,)
        self._accumulators[sums_key(span, kind)].add(regressors, y_TC)

    def result(self) -> dict[str, Moments]:
        assert not self._pending, f"no stop boundary came for {sorted(self._pending)}"
        self._finite.check()
        return {key: accumulator.result() for key, accumulator in self._accumulators.items()}


class FiniteCheck:
    """Remembers on the device whether each stream was finite; reads it back once."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, int]] = []
        self._flags: list[Tensor] = []
        self._on_the_way: FlagsOnTheWay | None = None

    def note(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        self._seen.append((boundary, window))
        # |x| sums to Inf or NaN exactly if an entry is, unless 3.4e38 / T is reached by right
        # numbers, which no model survives; far cheaper than a mask of T x C flags.
        wide = torch.promote_types(stream_TC.dtype, torch.float32)
        self._flags.append(torch.linalg.vector_norm(stream_TC, 1, dtype=wide))

    def send(self) -> None:
        """Nothing more comes: let the answer be on its way while the device does other things."""
        if self._flags:
            self._on_the_way = FlagsOnTheWay(self._flags)

    def check(self) -> None:
        """Raise NonFiniteActivationError for the first layer and window that was not finite."""
        if not self._flags:
            return
        flags = self._on_the_way or FlagsOnTheWay(self._flags)
        finite = flags.arrived()
        if not all(finite):
            bad = itertools.compress(self._seen, (not ok for ok in finite))
            raise NonFiniteActivationError(*min(bad))


class FlagsOnTheWay:
    """Whether numbers are finite, copied to the host behind what the device has to do so far."""

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        finite = torch.isfinite(torch.stack(list(numbers)))
        self._flags = finite.to("cpu", non_blocking=True)
        self._copied = mark(finite.device)

    def arrived(self) -> list[bool]:
        arrived(self._copied)
        flags: list[bool] = self._flags.tolist()
        return flags
