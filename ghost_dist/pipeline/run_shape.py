"""A run before it begins: its checked inputs, the sizes of its model, and the spans it may have."""

from dataclasses import dataclass
from functools import cached_property

import torch

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.model_sizes import ModelSizes
from ghost_dist.pipeline.candidates import Candidate, candidates_of, samples_of
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.solver.operators import OPERATORS
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import Regressors


@dataclass(frozen=True)
class RunShape:
    """What stages reckon their costs from.

    Of the evaluation's windows only the shape is looked at; ``free_bytes`` are the device's.
    """

    inputs: RunInputs
    sizes: ModelSizes
    free_bytes: int

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """As given; where they are not known yet, those that cost most: they end the model."""
        inputs, selection = self.inputs, self.inputs.config.selection
        if selection.given:
            return selection.removal(self.num_layers)[0]
        assert inputs.amount.layers is not None
        stop, left, spans = self.num_layers, inputs.amount.layers, []
        most = max(1, min(selection.most_spans or left, left, stop - left))
        for number in range(most):
            length = -(-left // (most - number))
            spans.append(Span(stop - length, stop))
            stop, left = stop - length - 1, left - length
        return tuple(sorted(spans))

    @cached_property
    def candidates(self) -> list[Candidate]:
        return candidates_of(self.inputs.config.operator, self.spans, self.inputs.refittable)

    @cached_property
    def samples(self) -> list[tuple[Span, Regressors]]:
        return samples_of(self.candidates, self.spans, self.inputs.refittable)

    def variant(self, candidate: Candidate) -> Variant:
        """The model with a candidate, as far as it decides which layers run."""
        operators = {}
        for span in self.spans:
            operator = OPERATORS[candidate.at(span, self.inputs.refittable).operator]
            operators[span] = Repair(
                weight_CC=torch.empty(0) if operator.acts else None,
                down_FC=torch.empty(0) if operator.refits else None,
            )
        return Variant(self.spans, operators)

    @property
    def num_layers(self) -> int:
        return self.inputs.architecture.num_layers

    @property
    def removed(self) -> frozenset[int]:
        return Variant(self.spans).removed

    @property
    def num_windows(self) -> int:
        return self.inputs.config.calibration.windows

    @property
    def window_length(self) -> int:
        return self.inputs.config.calibration.window_length

    @property
    def num_tokens(self) -> int:
        return self.num_windows * self.window_length

    @property
    def batch_tokens(self) -> int:
        return self.inputs.batch * self.window_length

    def inner_size(self, span: Span) -> int:
        """F of the MLP before a span; 0: it has none that can be looked into."""
        return self.inputs.architecture.inner_sizes.get(span.start - 1, 0)
