"""How alike the two ends of every candidate span are, by the published code, in one pass.

Legend: L layers, n layers to remove, T tokens of a window, C hidden width. Boundary L is what the
final norm receives; hidden states from ``output_hidden_states`` are normed there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ghost_dist.statistics.span_sums import Collector, FiniteCheck
from ghost_dist.statistics.sums import Sums


@dataclass(frozen=True)
class ScoreSums(Sums):
    """The score of every start, summed over windows; float64."""

    sums_S: Tensor  # S: starts, 0 to L - n
    count_1: Tensor  # windows

    def mean(self) -> tuple[float, ...]:
        return tuple((self.sums_S / self.count_1).tolist())


class ScoreCollector(Collector):
    """Sums the score of (stream at b, stream at b + n) over windows, for every start b.

    The published code of arXiv 2605.15491 calls ``torch.cosine_similarity(a, b)`` on streams of
    shape (1, T, C), whose default axis is 1: the *sequence*. So it measures, channel by channel,
    how alike the two time series are, averaged over channels, then over windows; massive channels
    count like any other, and the direction of a token's stream, which the next layer reads, is not
    looked at. It works in float16, here it is float32.
    """

    def __init__(self, num_layers: int, remove: int, device: torch.device) -> None:
        self._num_layers, self._remove = num_layers, remove
        self._sums = torch.zeros(num_layers - remove + 1, dtype=torch.float64, device=device)
        self._streams: dict[tuple[int, int], Tensor] = {}
        self._finite = FiniteCheck()
        self._num_tokens = self._num_windows = 0
        self.boundaries = tuple(range(num_layers + 1))

    def __call__(self, boundary: int, window: int, stream_TC: Tensor) -> None:
        self._finite.note(boundary, window, stream_TC)
        later_TC, start = stream_TC.float(), boundary - self._remove
        if start >= 0:
            earlier_TC = self._streams.pop((start, window))
            self._sums[start] += cosine_similarity(earlier_TC, later_TC, dim=0).double().mean()
        if boundary + self._remove <= self._num_layers:
            self._streams[boundary, window] = later_TC
        if boundary == 0:
            self._num_tokens += stream_TC.shape[0]
            self._num_windows += 1

    def result(self) -> dict[str, Sums]:
        self._finite.check()
        count_1 = self._sums.new_full((1,), self._num_windows)
        return {"scores": ScoreSums(self._num_tokens, self._sums, count_1)}
