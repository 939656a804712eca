"""The shape of a run in numbers, from its configuration and the model's headers.

``plan`` reckons with it, and so does ``recover`` where it chooses its engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.config import Config
from ghost_dist.devices import free_bytes
from ghost_dist.pipeline.automatic import batch_of, count_ranges
from ghost_dist.pipeline.candidates import (
    FINE_SHIFTS,
    SHIFTS,
    candidates_of,
    samples_of,
    searches_ridge,
)
from ghost_dist.pipeline.searching import search_shape
from ghost_dist.pipeline.selecting import Selector
from ghost_dist.planning.model_sizes import ModelSizes
from ghost_dist.planning.run_shape import RunShape, SampleShape, SearchShape, SelectionShape
from ghost_dist.solver.least_squares import RIDGE_GRID
from ghost_dist.solver.operators import OPERATORS, refits_down
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import Regressors
from ghost_dist.statistics.sum_costs import moments_bytes, num_regressors, saved_by_strips


def run_shape(
    config: Config,
    source: Checkpoint,
    architecture: Architecture,
    sizes: ModelSizes,
    device: torch.device,
    *,
    remove: int | None,
    refittable: frozenset[int],
    evaluation_tokens: Mapping[str, int],
) -> RunShape:
    """The run in numbers; ``evaluation_tokens`` by corpus.

    ``remove``: layers, where no spans are given; those that cost most are taken then.
    """
    calibration, operator = config.calibration, config.operator
    spans = config.selection.spans
    if spans is None:
        assert remove is not None
        spans = _costliest_spans(
            remove, config.selection.most_spans or remove, architecture.num_layers
        )
    candidates = candidates_of(operator, spans, refittable)
    samples = samples_of(candidates, spans, refittable)
    c = architecture.hidden_size
    width = c if operator.name == "auto" or OPERATORS[operator.name].acts else 0
    forms = 1 + any(c.features == "stream+norm" for c in candidates)
    searched = searches_ridge(operator)
    by_kl = operator.choose == "kl" and len(candidates) > 1
    return RunShape(
        sizes=sizes,
        num_tensors=len(source.tensors),
        num_windows=calibration.windows,
        window_length=calibration.window_length,
        batch=batch_of(config, device),
        num_ranges=count_ranges(config),
        folds=config.folds,
        selection=_selection(config, remove, architecture, sizes, device),
        spans=tuple(spans),
        spans_known=config.selection.spans is not None,
        samples=tuple(
            _sample(span, kind.regressors, architecture, config.engine.ranks)
            for span, kind in samples
        ),
        searches=_searches(candidates, spans, architecture, refittable),
        ridges=len(RIDGE_GRID) if operator.ridge == "auto" else 1,
        shifts=len(SHIFTS) if searched else 1,
        fine_shifts=len(FINE_SHIFTS) if searched else 0,
        by_kl=by_kl,
        validation_folds=len(config.left_out),
        plain_cut=len(candidates) > 1 and any(c.operator == "none" for c in candidates),
        final_folds=config.folds - config.judges_behind_the_fit(len(spans)),
        refits=len(spans) - 1 if operator.refit == "sequential" else 0,
        heal=operator.heal,
        first_changed=max(0, spans[0].start - refits_down(candidates[0].operator)),
        inner_sizes=architecture.inner_sizes,
        evaluation_tokens=evaluation_tokens,
        operator_bytes=len(spans) * forms * width * c * source.dtype.itemsize,
    )


def _costliest_spans(remove: int, max_spans: int, num_layers: int) -> tuple[Span, ...]:
    """Spans at the end of the model, as many as are allowed: most layers run, most sums taken."""
    count = max(1, min(max_spans, remove, num_layers - remove))
    stop, left, spans = num_layers, remove, []
    for number in range(count):
        length = -(-left // (count - number))
        spans.append(Span(stop - length, stop))
        stop, left = stop - length - 1, left - length
    return tuple(sorted(spans))


def _searches(
    candidates: list[Any],
    spans: tuple[Span, ...],
    architecture: Architecture,
    refittable: frozenset[int],
) -> tuple[SearchShape, ...]:
    """By span and least squares: how many candidates, not counting the shifts of a ridge."""
    searches = []
    for span in spans:
        width, inner = architecture.hidden_size, architecture.inner_sizes.get(span.start - 1, 0)
        forms: dict[tuple[Regressors, int], set[Any]] = {}
        for candidate in candidates:
            here = replace(candidate.at(span, refittable), shift=0.0)
            kind = here.kind()
            if kind is not None and kind.regressors != "absolute":
                size = here.num_regressors(width, inner)
                forms.setdefault((kind.regressors, size), set()).add(here)
        for (regressors, size), found in forms.items():
            searches.append(SearchShape(span, regressors, size, len(found)))
    return tuple(searches)


def _sample(
    span: Span, regressors: Regressors, architecture: Architecture, blocks: int
) -> SampleShape:
    width, inner = architecture.hidden_size, architecture.inner_sizes.get(span.start - 1, 0)
    size = 0 if regressors == "absolute" else num_regressors(regressors, width, inner)
    nbytes = moments_bytes(regressors, width, inner)
    return SampleShape(span, regressors, size, nbytes, nbytes - saved_by_strips(size, blocks))


def _selection(
    config: Config,
    remove: int | None,
    architecture: Architecture,
    sizes: ModelSizes,
    device: torch.device,
) -> SelectionShape | None:
    if remove is None:
        return None
    selector = Selector(config.selection, remove, architecture)
    if config.selection.criterion != "recoverability":
        searches = config.selection.searches
        search = search_shape(config, remove, architecture) if searches else None
        return SelectionShape({}, None, 0, 0, 1, search)
    # Weights are there before the sums: what they leave is what the run will see as free.
    free = free_bytes(device)
    left = free - sizes.decoder_bytes(architecture.num_layers)
    return SelectionShape(
        stops_of=selector.stops_of(),
        columns=selector.columns,
        start_bytes=selector.start_bytes(),
        start_stored_bytes=selector.start_stored_bytes(config.engine.ranks),
        starts_at_once=selector.starts_at_once(left if left > 0 else free),
    )
