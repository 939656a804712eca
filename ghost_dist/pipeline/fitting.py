"""Fits of many candidates at many spans from stored sums, here or wherever ``FitSpans`` sends them.

What fits, :class:`FitHere`, needs a store, a checkpoint and a device, and no run: a rank of a
cluster calls the same object that one process does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ghost_dist.calibration.split import fold_of_range
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.reader import Checkpoint, read_tensor
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.devices import SHARE_OF_FREE_MEMORY, free_bytes, free_or_cached_bytes, total_bytes
from ghost_dist.errors import ConfigError, SingularGramError
from ghost_dist.pipeline.candidates import Candidate, stored_kind
from ghost_dist.ridge import RelativeRidge
from ghost_dist.solver.down_proj import SingularOperatorError
from ghost_dist.solver.least_squares import Detail, Fit, fit_bytes, on_grid
from ghost_dist.solver.operators import OPERATORS, Fitting
from ghost_dist.spans import Span
from ghost_dist.statistics.at_hand import StoreAtHand
from ghost_dist.statistics.moments import Moments, stream_moments
from ghost_dist.statistics.span_sums import moments_bytes, sums_key
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.sums import Sums


@dataclass(frozen=True)
class Fitted:
    """One span's repair, and the folds it was fitted on, none of which may judge it."""

    repair: Repair
    fit: Fit | None
    folds: frozenset[int]

    def on_host(self) -> Fitted:
        """To be sent to another process."""
        return replace(self, repair=self.repair.to(torch.device("cpu")))


_SHARE_FOR_REPAIRS = 1 / 16  # of a GPU's memory

Outcome = Fitted | SingularGramError | SingularOperatorError
"""What a fit gave, or why there is none."""


@dataclass(frozen=True)
class FitJob:
    """One fit: a candidate as it is at a span, on some folds of the store."""

    candidate: Candidate
    span: Span
    folds: tuple[int, ...]
    detail: Detail = "all"
    dtype: torch.dtype | None = None
    """Of the repair, which stays on the device where there is room; None: float64 on the CPU."""


class FitSpans(Protocol):
    """Fits jobs from a store, in this process or on a cluster."""

    def __call__(
        self, store: StatisticsStore, jobs: Sequence[FitJob], advance: Callable[[int], None]
    ) -> list[Outcome]:
        """An outcome for each job, in their order; ``advance`` is told of every one."""


class RidgeFits:
    """Fits from sums at hand, with the ridge that a candidate means.

    A candidate with a shift has the ridge of least held-out residual times ``10^shift``: that one
    is looked for once for the same sums. Candidates in a row that differ in the ridge only share
    what does not depend on it.
    """

    def __init__(self, norm_eps: float) -> None:
        self._norm_eps = norm_eps
        self._least_residual: dict[tuple[Candidate, Span, tuple[int, ...]], Fit] = {}
        self._shared: tuple[Any, Fitting] | None = None

    def fit(
        self,
        candidate: Candidate,
        span: Span,
        folds: Sequence[Moments],
        down_FC: Tensor | None,
        picked: tuple[int, ...],
        judge: int | None = None,
        detail: Detail = "all",
    ) -> tuple[Repair, Fit | None]:
        """Fit one span, of a candidate as it is there.

        ``folds`` are sums of disjoint windows, on one device; ``picked`` names them among those of
        this span. ``down_FC`` is the model's down_proj of layer ``start - 1``, float64, where they
        are ``joint``. ``judge`` is the fold that alone judges, and that is not fitted on; None:
        each judges fits on the others. ``detail``: as ``fit_least_squares`` says.
        """
        kind, fit_operator = candidate.kind(), OPERATORS[candidate.operator].fit
        if kind is None or fit_operator is None:
            return Repair(), None
        of_grid = replace(candidate, ridge="auto", shift=0.0), span, picked
        if self._shared is None or self._shared[0] != of_grid:
            self.drop()
            options: dict[str, Any] = {"judge": judge, "around": candidate.around, "kept": {}}
            if kind == "joint":
                options["down_FC"] = down_FC
            elif kind == "stream+norm":
                options["norm_eps"] = self._norm_eps
            elif down_FC is not None:
                folds = [stream_moments(fold, down_FC) for fold in folds]
            self._shared = of_grid, partial(fit_operator, str(span), folds, **options)
        fit = partial(self._shared[1], detail=detail)
        if candidate.ridge != "auto":
            return fit(candidate.ridge)
        least = self._least_residual.get(of_grid)
        if least is None:
            repair, least = fit("auto")
            self._least_residual[of_grid] = least
            if candidate.shift == 0:
                return repair, least
        relative = on_grid(least.relative_ridge * 10**candidate.shift)
        repair, found = fit(RelativeRidge(relative=relative))
        return repair, on_curve(found, least)

    def drop(self) -> None:
        """Give the memory of what candidates shared back."""
        self._shared = None


def on_curve(fit: Fit, least: Fit) -> Fit:
    """A fit that has looked at few ridges, with the others of the whole grid."""
    curve = {**dict(least.ridge_curve), **dict(fit.ridge_curve)}
    return replace(fit, ridge_curve=tuple(sorted(curve.items())))


@dataclass
class _Placed:
    """Sums of a span where they are computed with, by fold, as they were needed."""

    key: str
    device: torch.device
    down_FC: Tensor | None  # of joint sums the down_proj before the span
    folds: dict[int, Moments]


class FitHere:
    """Fits in this process, one after the other; see :class:`FitSpans`.

    ``folds`` are those that the store's ranges are dealt to. It computes on ``device`` where a fit
    takes at most ``room`` bytes, else on the CPU; ``make_room`` is called if less than that is
    free.
    """

    def __init__(
        self,
        source: Checkpoint,
        architecture: Architecture,
        folds: int,
        device: torch.device,
        room: int,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._make_room = make_room
        self._source, self._architecture = source, architecture
        self._num_folds, self._wanted_device, self._room = folds, device, room
        self._ridges = RidgeFits(architecture.norm_eps)
        self._store: StatisticsStore | None = None
        self._held: dict[str, Sequence[Sums]] = {}
        self._placed: _Placed | None = None
        self._kept_bytes = 0

    def __call__(
        self, store: StatisticsStore, jobs: Sequence[FitJob], advance: Callable[[int], None]
    ) -> list[Outcome]:
        """An outcome for each job; see :class:`FitSpans`."""
        if store is not self._store:
            self._store, self._placed = store, None
            self._ridges = RidgeFits(self._architecture.norm_eps)
        outcomes: dict[int, Outcome] = {}
        self._kept_bytes = 0
        try:
            for number in in_reading_order(jobs):
                job = jobs[number]
                try:
                    outcomes[number] = Fitted(Repair(), None, frozenset())
                    if job.candidate.kind() is not None:
                        # No name here holds sums: they go before those of another span come.
                        repair, fit = self._ridges.fit(*self._given(store, job))
                        repair = self._kept(repair, job.dtype)
                        outcomes[number] = Fitted(repair, fit, frozenset(job.folds))
                except (SingularGramError, SingularOperatorError) as error:
                    outcomes[number] = error.with_traceback(None)  # which would keep the sums
                except torch.OutOfMemoryError as error:
                    raise ConfigError(
                        f"A fit at {job.span} has no room on {self._wanted_device}, where "
                        f"{free_bytes(self._wanted_device) / 1e9:.2f} GB are free. Free memory "
                        "there; the same command continues."
                    ) from error
                advance(1)
        finally:
            if self._placed is not None and self._placed.device.type != "cpu":
                self._placed = None  # the model may run there next
            self._ridges.drop()
        return [outcomes[number] for number in range(len(jobs))]

    def hold(self, key: str, folds: Sequence[Sums]) -> None:
        """Take the sums of every fold from here on, instead of reading them from a store."""
        self._held[key] = folds

    def _kept(self, repair: Repair, dtype: torch.dtype | None) -> Repair:
        """A repair in the dtype that is wanted, on the device where that is and there is room."""
        assert self._placed is not None, "what was fitted has sums"
        if dtype is not None:
            repair = repair.stored(dtype, dtype)
            self._kept_bytes += sum(part.nbytes for part in repair.parts().values())
        room = _SHARE_FOR_REPAIRS * total_bytes(self._placed.device)
        kept = dtype is not None and self._kept_bytes <= room
        return repair if kept else repair.to(torch.device("cpu"))

    def _given(
        self, store: StatisticsStore, job: FitJob
    ) -> tuple[Candidate, Span, list[Moments], Tensor | None, tuple[int, ...], None, Detail]:
        """For ``RidgeFits.fit``; sums are brought to the device once for jobs in a row."""
        span, wanted = job.span, job.candidate.kind()
        assert wanted is not None, "the plain cut has no sums"
        kind = stored_kind(wanted, span, store.plan.entries)
        assert kind is not None, "the store was checked"
        key, layer = sums_key(span, kind), span.start - 1
        if self._placed is None or self._placed.key != key:
            self._placed = None  # gives its memory back first
            self._ridges.drop()
            inner = self._architecture.inner_sizes.get(layer, 0)
            nbytes = moments_bytes(kind, self._architecture.hidden_size, inner)
            device, down_FC = self._device(store, nbytes), None
            if kind == "joint":
                down_FC = read_down(self._source, self._architecture, layer, device)
            self._placed = _Placed(key, device, down_FC, {})
        for fold in job.folds:
            if fold not in self._placed.folds:
                self._placed.folds[fold] = self._fold(store, key, fold, self._placed.device)
        folds = [self._placed.folds[fold] for fold in job.folds]
        return job.candidate, span, folds, self._placed.down_FC, job.folds, None, job.detail

    def _fold(self, store: StatisticsStore, key: str, fold: int, device: torch.device) -> Moments:
        """Sums of a fold, its ranges added in id order."""
        if key in self._held:
            found = self._held[key][fold].to(device)
        else:
            ranges = range(len(store.plan.ranges))
            ids = [i for i in ranges if fold_of_range(i, self._num_folds) == fold]
            found = store.total(ids, [key], device)[key]
        assert isinstance(found, Moments)
        return found

    def _device(self, store: StatisticsStore, nbytes: int) -> torch.device:
        """The wanted device if it has room for sums of so many bytes a fold, whoever has that now;
        else the CPU. It is cleared of what could be elsewhere, if that is in the way.
        """
        device = self._wanted_device
        if device.type != "cuda":
            return device
        needed = fit_bytes(self._num_folds * nbytes, self._num_folds)
        if needed > self._room:
            return torch.device("cpu")
        at_hand = store if isinstance(store, StoreAtHand) else None
        if at_hand is not None and len(store.plan.ranges) == self._num_folds:
            needed -= at_hand.bytes_at_hand(device)  # which are those of the folds
        if needed > free_or_cached_bytes(device):
            self._make_room()
            if at_hand is not None:
                at_hand.to_host()
        return device


def fit_room(device: torch.device) -> int:
    """Bytes of the largest fit on a device, whoever has some of its memory now."""
    return int(SHARE_OF_FREE_MEMORY * total_bytes(device))


def in_reading_order(jobs: Sequence[FitJob]) -> list[int]:
    """Numbers of the jobs, span by span and by the sums they need, so that these are read once."""
    spans = list(dict.fromkeys(job.span for job in jobs))
    return sorted(
        range(len(jobs)), key=lambda i: (spans.index(jobs[i].span), str(jobs[i].candidate.kind()))
    )


def read_down(
    source: Checkpoint, architecture: Architecture, layer: int, device: torch.device
) -> Tensor:
    """The model's down_proj of a layer, (F, C) float64."""
    name = f"{architecture.tensor_prefix}.{layer}.{architecture.down_projections[layer]}.weight"
    return read_tensor(source, name).to(device).T.double()
