"""How alike the two ends of every candidate span are: the criteria of other work, in one pass.

Legend: L layers, n layers to remove, T tokens of a window, C hidden width. Boundary b is the stream
entering layer b, boundary L what the final norm receives, never normed itself: hidden states from
``output_hidden_states`` are, which spoils the last candidate of implementations built on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ghost_dist.statistics.span_sums import FiniteCheck
from ghost_dist.statistics.sums import Sums


@dataclass(frozen=True)
class ScoreSums(Sums):
    """A score of every start, summed; float64."""

    sums_S: Tensor  # S: starts, 0 to L - n
    count_1: Tensor  # tokens or windows, whichever the score is of

    def mean(self) -> tuple[float, ...]:
        """Mean score of every start."""
        return tuple((self.sums_S / self.count_1).tolist())


class _PairScores:
    """Sums a score of (stream at b, stream at b + n) over windows, for every start b.

    Holds the last n + 1 streams of each window in flight.
    """

    mlp_layers: ClassVar[tuple[int, ...]] = ()

    def __init__(self, num_layers: int, remove: int, device: torch.device) -> None:
        self._num_layers, self._remove = num_layers, remove
        self._sums = torch.zeros(num_layers - remove + 1, dtype=torch.float64, device=device)
        self._streams: dict[tuple[int, int], Tensor] = {}
        self._finite = FiniteCheck()
        self._num_tokens = self._count = 0

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Every boundary, 0 to L."""
        return tuple(range(self._num_layers + 1))

    def take_mlp(self, layer: int, window: int, input_TF: Tensor, product_TC: Tensor) -> None:
        """Never called: ``mlp_layers`` is empty."""
        raise NotImplementedError

    def __call__(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        """Take the stream of one window at one boundary, shape (T, C)."""
        self._finite.note(boundary, window, stream_TC)
        kept = self._keep(stream_TC)
        start = boundary - self._remove
        if start >= 0:
            self._sums[start] += self._score(self._streams.pop((start, window)), kept)
        if boundary + self._remove <= self._num_layers:
            self._streams[boundary, window] = kept
        if boundary == 0:
            self._num_tokens += stream_TC.shape[0]
            self._count += self._weight(kept)

    def result(self) -> dict[str, Sums]:
        """``{"scores": ScoreSums}``."""
        self._finite.check()
        count_1 = torch.full((1,), float(self._count), dtype=torch.float64)
        return {"scores": ScoreSums(self._num_tokens, self._sums, count_1.to(self._sums.device))}

    def _keep(self, stream_TC: Tensor) -> Tensor:
        return stream_TC.float()

    def _weight(self, kept: Tensor) -> int:  # noqa: ARG002
        return 1

    def _score(self, earlier: Tensor, later: Tensor) -> Tensor:
        raise NotImplementedError


class CosineCollector(_PairScores):
    """``cos(x_b, x_{b+n})`` per token over the hidden width; the span of largest mean goes.

    The criterion of LLM-Streamline (arXiv 2403.19135), in float32; every start from 0 to L - n
    counts, including a span that ends at the last layer.
    """

    def _weight(self, kept: Tensor) -> int:
        return kept.shape[0]

    def _score(self, earlier: Tensor, later: Tensor) -> Tensor:
        return cosine_similarity(earlier, later, dim=1).double().sum()


class AngularCollector(_PairScores):
    """``arccos(cos) / pi`` between the ends at each window's last token; the least span goes.

    The criterion of PruneMe (arXiv 2403.17887, equation 5) and ReplaceMe (arXiv 2505.02819).
    Holds C numbers per boundary and window in flight.
    """

    def _keep(self, stream_TC: Tensor) -> Tensor:
        return stream_TC[-1:].double()

    def _score(self, earlier: Tensor, later: Tensor) -> Tensor:
        cosine_1 = cosine_similarity(earlier, later, dim=1).clamp(-1, 1)
        return (cosine_1.arccos() / math.pi).sum()


class BlockInfluenceCollector(_PairScores):
    """``1 - mean cos(x_l, x_{l+1})`` per layer l, over tokens; the layers of least influence go.

    ShortGPT's block influence (arXiv 2403.03853, equation 1). The result has one number per layer.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        super().__init__(num_layers, 1, device)

    def _weight(self, kept: Tensor) -> int:
        return kept.shape[0]

    def _score(self, earlier: Tensor, later: Tensor) -> Tensor:
        return (1 - cosine_similarity(earlier, later, dim=1)).double().sum()


class PaperCollector(_PairScores):
    """The selection score of the published code of arXiv 2605.15491, for parity only.

    That code calls ``torch.cosine_similarity(a, b)`` on streams of shape (1, T, C), whose default
    axis is 1: the *sequence*. So it measures, channel by channel, how alike the two time series
    are, averaged over channels, then over windows; massive channels count like any other, and the
    direction of a token's stream, which the next layer reads, is not looked at. It also tries
    starts 1 to L - n - 1 only (``solver/criteria.py``). The published code works in float16, here
    it is float32. Use ``cosine`` for the criterion that was meant.
    """

    def _score(self, earlier: Tensor, later: Tensor) -> Tensor:
        return cosine_similarity(earlier, later, dim=0).double().mean()
