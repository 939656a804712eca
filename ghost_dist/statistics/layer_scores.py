"""How alike the two ends of every candidate span are: the criteria of other work, in one pass.

Legend: L layers, n layers to remove, T tokens of a window, C hidden width. Boundary L is what the
final norm receives; hidden states from ``output_hidden_states`` are normed there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ghost_dist.statistics.span_sums import Collector, FiniteCheck
from ghost_dist.statistics.sums import Sums


@dataclass(frozen=True)
class ScoreSums(Sums):
    """A score of every start, summed; float64."""

    sums_S: Tensor  # S: starts, 0 to L - n
    count_1: Tensor  # tokens or windows, whichever the score is of

    def mean(self) -> tuple[float, ...]:
        return tuple((self.sums_S / self.count_1).tolist())


def _cosine(earlier: Tensor, later: Tensor) -> Tensor:
    """Per token over the hidden width, the criterion of LLM-Streamline (arXiv 2403.19135)."""
    return cosine_similarity(earlier, later, dim=1).double().sum()


def _angular(earlier: Tensor, later: Tensor) -> Tensor:
    """``arccos(cos) / pi`` at each window's last token: PruneMe (arXiv 2403.17887, equation 5) and
    ReplaceMe (arXiv 2505.02819).
    """
    return (cosine_similarity(earlier, later, dim=1).clamp(-1, 1).arccos() / math.pi).sum()


def _block_influence(earlier: Tensor, later: Tensor) -> Tensor:
    """``1 - cos`` of each layer, over tokens: ShortGPT (arXiv 2403.03853, equation 1)."""
    return (1 - cosine_similarity(earlier, later, dim=1)).double().sum()


def _paper(earlier: Tensor, later: Tensor) -> Tensor:
    """The selection score of the published code of arXiv 2605.15491, for parity only.

    That code calls ``torch.cosine_similarity(a, b)`` on streams of shape (1, T, C), whose default
    axis is 1: the *sequence*. So it measures, channel by channel, how alike the two time series
    are, averaged over channels, then over windows; massive channels count like any other, and the
    direction of a token's stream, which the next layer reads, is not looked at. It also tries
    starts 1 to L - n - 1 only (``solver/criteria.py``). The published code works in float16, here
    it is float32. Use ``cosine`` for the criterion that was meant.
    """
    return cosine_similarity(earlier, later, dim=0).double().mean()


SCORES = {
    "cosine": _cosine,
    "angular": _angular,
    "block-influence": _block_influence,
    "paper": _paper,
}


class ScoreCollector(Collector):
    """Sums a score of (stream at b, stream at b + n) over tokens or windows, for every start b."""

    def __init__(self, criterion: str, num_layers: int, remove: int, device: torch.device) -> None:
        self._criterion, self._score = criterion, SCORES[criterion]
        self._of_tokens = criterion in ("cosine", "block-influence")
        self._num_layers = num_layers
        self._remove = 1 if criterion == "block-influence" else remove
        self._sums = torch.zeros(num_layers - self._remove + 1, dtype=torch.float64, device=device)
        self._streams: dict[tuple[int, int], Tensor] = {}
        self._finite = FiniteCheck()
        self._num_tokens = self._count = 0
        self.boundaries = tuple(range(num_layers + 1))

    def __call__(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        self._finite.note(boundary, window, stream_TC)
        kept = stream_TC[-1:].double() if self._criterion == "angular" else stream_TC.float()
        start = boundary - self._remove
        if start >= 0:
            self._sums[start] += self._score(self._streams.pop((start, window)), kept)
        if boundary + self._remove <= self._num_layers:
            self._streams[boundary, window] = kept
        if boundary == 0:
            self._num_tokens += stream_TC.shape[0]
            self._count += kept.shape[0] if self._of_tokens else 1

    def result(self) -> dict[str, Sums]:
        self._finite.check()
        count_1 = self._sums.new_full((1,), self._count)
        return {"scores": ScoreSums(self._num_tokens, self._sums, count_1)}
