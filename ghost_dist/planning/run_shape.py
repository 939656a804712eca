"""A run in numbers: what ``stage_work.py`` and ``memory.py`` reckon with; no file, no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ghost_dist.planning.model_sizes import ModelSizes
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import Regressors


@dataclass(frozen=True)
class RemovalSearch:
    """What a search for layers takes, at most."""

    fitted_tokens: int  # whose dense streams are kept
    judged_tokens: int  # all evaluations together
    sweeps: int


@dataclass(frozen=True)
class SelectionShape:
    """Sums of a selection."""

    stops_of: Mapping[int, int]  # recoverability: number of stops of every start; else empty
    columns: int | None  # r of its projection; None: the whole cross
    start_bytes: int  # of the largest start
    start_stored_bytes: int
    starts_at_once: int
    search: RemovalSearch | None = None  # none with the other criteria

    @property
    def passes(self) -> int:
        """Over all windows."""
        return max(1, -(-len(self.stops_of) // self.starts_at_once))


@dataclass(frozen=True)
class SampleShape:
    """Sums of one span and kind."""

    span: Span
    kind: Regressors  # of regressors
    size: int  # Z; 0 for absolute
    nbytes: int
    stored_bytes: int


@dataclass(frozen=True)
class SearchShape:
    """Fits of one span that ``solve`` makes."""

    span: Span
    kind: Regressors
    size: int
    candidates: int  # row weights, each with all shifts of its ridge


@dataclass(frozen=True)
class RunShape:
    """A run in numbers."""

    sizes: ModelSizes
    num_tensors: int
    num_windows: int
    window_length: int
    batch: int
    num_ranges: int
    folds: int
    selection: SelectionShape | None  # none where spans are given
    spans: tuple[Span, ...]  # where not known yet, those that cost most
    spans_known: bool
    samples: tuple[SampleShape, ...]
    searches: tuple[SearchShape, ...]
    ridges: int  # of a fit whose ridge is searched
    shifts: int  # ridges tried by KL around the one of least residual; 1 and 0: none
    fine_shifts: int
    plain_cut: bool  # whether it is a candidate
    by_kl: bool  # false too where there is only one candidate
    validation_folds: int  # that candidates are compared on, one after the other
    final_folds: int
    refits: int  # spans fitted again on the recovered stream
    heal: bool
    first_changed: int  # the first layer that a candidate changes
    inner_sizes: Mapping[int, int]  # F by layer
    evaluation_tokens: Mapping[str, int]  # by corpus
    operator_bytes: int  # in the exported checkpoint

    @property
    def num_tokens(self) -> int:
        """Of calibration."""
        return self.num_windows * self.window_length

    @property
    def num_layers(self) -> int:
        """Of the uncut model."""
        return len(self.sizes.layers)

    @property
    def last_boundary(self) -> int:
        """Where the forward of calibration ends."""
        return self.spans[-1].stop

    @property
    def removed(self) -> frozenset[int]:
        """Layers that go."""
        return frozenset(layer for span in self.spans for layer in range(span.start, span.stop))

    @property
    def kept_stored_bytes(self) -> int:
        """Of the recovered checkpoint."""
        gone = sum(self.sizes.layers[layer].exported_bytes for layer in self.removed)
        return self.sizes.exported_bytes - gone + self.operator_bytes

    @property
    def samples_bytes(self) -> int:
        """Of the sums of one range."""
        return sum(sample.nbytes for sample in self.samples)

    @property
    def samples_stored_bytes(self) -> int:
        """Of the sums of one range in the store."""
        return sum(sample.stored_bytes for sample in self.samples)

    @property
    def runs_whole_model(self) -> bool:
        """Whether ``solve`` runs the whole causal LM."""
        return self.by_kl or bool(self.refits) or self.heal
