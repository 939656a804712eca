"""Which layers go by the paper's score: from a collector of it to the span that is alike most."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.errors import ConfigError
from ghost_dist.pipeline.collectors import pass_cost
from ghost_dist.pipeline.cost import SMALL_BYTES, Cost
from ghost_dist.spans import Span
from ghost_dist.statistics.layer_scores import ScoreCollector, ScoreSums
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.sums import ColumnBlock

if TYPE_CHECKING:
    from ghost_dist.pipeline.run_shape import RunShape


@dataclass(frozen=True)
class PaperScores:
    """The ``Collectors`` of ``selection.criterion=paper``."""

    remove: int
    protect: Collection[int]
    architecture: Architecture

    def candidates(self) -> tuple[Span, ...]:
        """ConfigError if there are none. The published code never tries the first or last start."""
        spans = tuple(
            Span(start, start + self.remove)
            for start in range(1, self.architecture.num_layers - self.remove)
            if not any(start <= layer < start + self.remove for layer in self.protect)
        )
        if not spans:
            raise ConfigError(
                f"No span of {self.remove} layers is a candidate with {len(set(self.protect))} "
                "protected layers. Remove fewer layers or protect fewer (selection.protect)."
            )
        return spans

    @property
    def entries(self) -> dict[str, str]:
        return {"scores": "scores"}

    def collector(self, device: torch.device, _: ColumnBlock) -> ScoreCollector:
        return ScoreCollector(self.architecture.num_layers, self.remove, device)

    def cost(self, run: RunShape) -> Cost:
        streams_bytes = (self.remove + 1) * run.sizes.stream_bytes(run.batch_tokens)
        cost = pass_cost(self, run, run.inputs.config.folds, streams_bytes)
        cost.sums_bytes = SMALL_BYTES
        return cost

    def decide(self, store: StatisticsStore) -> tuple[Span, list[float | None]]:
        """The span of the largest score, the first of equals; the scores by first layer."""
        sums = store.total()["scores"]
        assert isinstance(sums, ScoreSums)
        scores = sums.mean()
        best = max(self.candidates(), key=lambda span: scores[span.start])
        return best, [None, *scores[1:-1], None]
