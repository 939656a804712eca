"""A run in numbers: what ``stages.py`` and ``memory.py`` reckon with; no file, no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ghost_dist.planning.sizes import ModelSizes
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import Regressors


@dataclass(frozen=True)
class SelectionShape:
    """Sums of a selection.

    Attributes
    ----------
    criterion
        As configured.
    stops_of
        recoverability: number of stops of every start; else empty.
    columns
        r of its projection, None the whole cross.
    start_bytes, start_stored_bytes, starts_at_once
        Bytes of the largest start's sums, and starts of one pass; 0 and 1 without them.
    """

    criterion: str
    stops_of: Mapping[int, int]
    columns: int | None
    start_bytes: int
    start_stored_bytes: int
    starts_at_once: int

    @property
    def passes(self) -> int:
        """Over all windows."""
        return max(1, -(-len(self.stops_of) // self.starts_at_once))


@dataclass(frozen=True)
class SampleShape:
    """Sums of one span and kind.

    Attributes
    ----------
    span
        Half-open.
    kind
        Of regressors.
    size
        Z; 0 for ``absolute``.
    nbytes, stored_bytes
        Of the sums, in memory and in the store.
    """

    span: Span
    kind: Regressors
    size: int
    nbytes: int
    stored_bytes: int


@dataclass(frozen=True)
class SearchShape:
    """Fits of one span that ``solve`` makes.

    Attributes
    ----------
    span
        Half-open.
    kind, size
        Of the sums, and Z of the least squares.
    candidates
        Row weights that are tried, each with all shifts of its ridge.
    """

    span: Span
    kind: Regressors
    size: int
    candidates: int


@dataclass(frozen=True)
class RunShape:
    """A run in numbers.

    Attributes
    ----------
    sizes
        Of the model, in the compute dtype.
    num_tensors
        Of the checkpoint.
    num_windows, window_length, batch, num_ranges, folds
        Of calibration.
    selection
        None where spans are given.
    spans, spans_known
        What is removed; where that is not known yet, the spans that cost most.
    samples
        Sums that are taken.
    searches
        Fits that are made.
    ridges
        Ridges of a fit whose ridge is searched: those of the grid, or 1.
    shifts, fine_shifts
        Ridges tried by KL around the one of least residual; 1, 0 where none are.
    plain_cut
        Whether it is compared with the candidates that are fitted.
    by_kl
        Whether candidates are compared by KL; false too where there is only one.
    judges
        Folds that they are judged on, one after the other.
    final_folds
        Folds that the choice is fitted on.
    refits, heal
        Spans fitted again on the recovered stream; whether later layers are refitted.
    first_changed
        The first layer that a candidate changes.
    inner_sizes
        F by layer.
    evaluation_tokens
        Of each corpus.
    operator_bytes
        Of all operators in the exported checkpoint.
    """

    sizes: ModelSizes
    num_tensors: int
    num_windows: int
    window_length: int
    batch: int
    num_ranges: int
    folds: int
    selection: SelectionShape | None
    spans: tuple[Span, ...]
    spans_known: bool
    samples: tuple[SampleShape, ...]
    searches: tuple[SearchShape, ...]
    ridges: int
    shifts: int
    fine_shifts: int
    plain_cut: bool
    by_kl: bool
    judges: int
    final_folds: int
    refits: int
    heal: bool
    first_changed: int
    inner_sizes: Mapping[int, int]
    evaluation_tokens: Mapping[str, int]
    operator_bytes: int

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
    def kept_loaded_bytes(self) -> int:
        """Of the recovered model in memory."""
        gone = sum(self.sizes.layers[layer].loaded_bytes for layer in self.removed)
        return self.sizes.causal_lm_bytes - gone + self.operator_bytes

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
