"""Which spans go, by the held-out residual that is left after repair, or by the paper's score.

Legend: L layers, B = L + 1 boundaries, C hidden width, P stops of one start, r projected columns.
A map is (L, B), indexed [start, stop], NaN where no number was computed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ghost_dist.errors import ConfigError
from ghost_dist.solver.least_squares import (
    RIDGE_GRID,
    add_all,
    cholesky_factor,
    downhill,
    held_out_errors,
    mixed_errors,
    ridge_scale,
    singular,
)
from ghost_dist.spans import Span
from ghost_dist.statistics.moments import Moments
from ghost_dist.statistics.pair_sums import PROJECTION_COLUMNS, PairMoments


@dataclass(frozen=True)
class HeldOut:
    """Energies of one span over all windows, each predicted by an operator not fitted on it."""

    residual: float  # ||Y - X W||^2 at the best ridge
    standard_error: float  # of it, from the projection alone; 0 if exact
    cut: float  # ||Y - X||^2
    energy: float  # ||Y||^2 of the stream entering stop
    relative_ridge: float


def held_out_of_start(
    start: int,
    stops: Sequence[int],
    folds: Sequence[PairMoments],
    projection_Cr: Tensor | None,
    around: float | None = None,
) -> dict[Span, HeldOut]:
    """Held-out energies of all spans of one start, from the (projected) targets ``(Y - X) R``.

    ``projection_Cr`` is R, as the moments were taken with; None: they are exact. The estimate is
    ``cut * sum_k e_k / sum_k c_k`` over the r columns, e_k the held-out error and c_k the plain
    cut's of column k, and ``cut`` the exact energy: dividing by the columns' own cut takes out what
    the projection does to both alike. Its standard error is that of a ratio of means, from the
    spread of ``e_k - ratio c_k`` over the columns.

    One Cholesky factor per ridge and fold serves all stops; each span has a ridge of its own. Exact
    errors of one stop are followed downhill from ``around``, or the ridge of least error of
    mixtures.
    Memory beside the folds: about 3 C^2 + 3 C P r float64 (2 GiB at C = 8192, P = 40, r = 64).
    """
    changes = [_projected_change(fold, projection_Cr) for fold in folds]
    total = add_all(changes)
    shape = (len(stops), folds[0].sumsq_target_Pr.shape[1])
    scale_C = ridge_scale(total.gram_ZZ)
    errors_at = partial(held_out_errors, changes, total, scale_C)
    if shape[1] <= PROJECTION_COLUMNS or len(stops) > 1:
        around = None
    elif around is None:
        error_of = mixed_errors(changes, total, scale_C)
        around = min(error_of, key=error_of.__getitem__, default=None)
    errors = errors_at(RIDGE_GRID) if around is None else downhill(errors_at, around)
    if not errors:
        raise singular(f"[{start}, {stops[-1]})", total, RIDGE_GRID[-1])
    ridge_R = tuple(errors)
    error_RPr = torch.stack([error.reshape(shape) for error in errors.values()])
    best_P = error_RPr.sum(2).argmin(0)
    error_Pr = error_RPr[best_P, torch.arange(len(stops), device=best_P.device)]
    cut_Pr = total.sumsq_y_C.reshape(shape)
    sum_cut_P = cut_Pr.sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    ratio_P = error_Pr.sum(1) / sum_cut_P
    spread_P = (error_Pr - ratio_P.unsqueeze(1) * cut_Pr).std(1) * shape[1] ** 0.5 / sum_cut_P

    exact_cut_P = sum(fold.sumsq_change_P for fold in folds)
    energy_P = sum(fold.sumsq_y_P for fold in folds)
    assert isinstance(exact_cut_P, Tensor)
    assert isinstance(energy_P, Tensor)
    return {
        Span(start, stop): HeldOut(
            residual=float(ratio_P[p] * exact_cut_P[p]),
            standard_error=(0.0 if projection_Cr is None else float(spread_P[p] * exact_cut_P[p])),
            cut=float(exact_cut_P[p]),
            energy=float(energy_P[p]),
            relative_ridge=ridge_R[int(best_P[p])],
        )
        for p, stop in enumerate(stops)
    }


def cross_fit_start(
    start: int, stops: Sequence[int], parts: Sequence[PairMoments], ridges: Sequence[float]
) -> dict[Span, tuple[list[Tensor], float]]:
    """W (C, C) of every span of one start, for each part one that is fitted on the other parts.

    With it the relative ridge of least residual on the parts left out; or the plain cut.
    """
    changes = [_projected_change(part, None) for part in parts]
    total = add_all(changes)
    others = [total - change for change in changes]
    scale_C = ridge_scale(total.gram_ZZ)
    of_ridges = [
        [cholesky_factor(one.gram_ZZ, ridge * scale_C) for one in others] for ridge in ridges
    ]
    failed = torch.stack([torch.stack([info for _, info in one]).sum() for one in of_ridges])
    factors = {
        ridge: [factor_CC for factor_CC, _ in of_ridge]
        for ridge, of_ridge, failures in zip(ridges, of_ridges, failed.tolist(), strict=True)
        if not failures
    }
    if not factors:
        raise singular(f"[{start}, {stops[-1]})", others[0], ridges[-1])
    width = len(scale_C)
    eye_CC = torch.eye(width, dtype=torch.float64, device=scale_C.device)
    found = {}
    for number, stop in enumerate(stops):
        columns = slice(number * width, (number + 1) * width)
        # The plain cut, and the maps of each ridge; a device is waited for once.
        tried = [[torch.zeros_like(eye_CC)] * len(parts)]
        residuals = [total.sumsq_y_C[columns].sum()]
        for factored in factors.values():
            maps, of_parts = [], []
            for change, other, factor_CC in zip(changes, others, factored, strict=True):
                map_CC = torch.cholesky_solve(other.cross_ZC[:, columns], factor_CC)
                maps.append(map_CC)
                product_CC = change.gram_ZZ @ map_CC - 2 * change.cross_ZC[:, columns]
                of_parts.append(change.sumsq_y_C[columns].sum() + (map_CC * product_CC).sum())
            tried.append(maps)
            residuals.append(torch.stack(of_parts).sum())
        cut, *of_ridge = torch.stack(residuals).tolist()
        best = of_ridge.index(min(of_ridge))
        maps = tried[best + 1] if of_ridge[best] < cut else tried[0]
        found[Span(start, stop)] = [eye_CC + map_CC for map_CC in maps], [*factors][best]
    return found


def relative_residual(held_out: HeldOut) -> float:
    """``residual / ||Y||^2``: the share of the stream's energy that repair does not explain."""
    return max(0.0, held_out.residual / held_out.energy)


def lost_log_energy(held_out: HeldOut) -> float:
    """The cost of a span: ``-log(1 - residual / ||Y||^2)``, at most 27.6.

    What several spans in a row explain of the energy is about the product of their shares, so the
    logarithms add.
    """
    return -math.log(max(1e-12, 1.0 - relative_residual(held_out)))


def cost_map(num_layers: int, held_out: Mapping[Span, HeldOut]) -> Tensor:
    """The cost of every candidate, float64; NaN where the mapping has no such span."""
    cost_LB = torch.full((num_layers, num_layers + 1), math.nan, dtype=torch.float64)
    for span, energies in held_out.items():
        cost_LB[span.start, span.stop] = lost_log_energy(energies)
    return cost_LB


def choose_spans(cost_LB: Tensor, remove: int, max_spans: int) -> tuple[Span, ...]:
    """At most ``max_spans`` spans that remove exactly ``remove`` layers at least total cost.

    Spans neither overlap nor touch: two that touch would be one span with one operator, whose cost
    is its own entry of the map; what is not finite there cannot be taken. Exact, by dynamic
    programming over boundaries; of equal costs the fewest spans win, then the earliest. O(L^2
    max_spans remove) steps.
    """
    num_layers = cost_LB.shape[0]
    costs = cost_LB.tolist()
    # states[b]: layers below b are decided and layer b - 1 stays; (spans, removed) -> the best
    # (cost, number of spans, spans). Index L + 1: layer L - 1 was removed.
    choice = tuple[float, int, tuple[Span, ...]]
    states: list[dict[tuple[int, int], choice]] = [{} for _ in range(num_layers + 2)]
    states[0][0, 0] = (0.0, 0, ())

    def offer(boundary: int, key: tuple[int, int], candidate: choice) -> None:
        if key not in states[boundary] or candidate < states[boundary][key]:
            states[boundary][key] = candidate

    for start in range(num_layers):
        for (count, removed), (cost, _, spans) in states[start].items():
            offer(start + 1, (count, removed), (cost, count, spans))
            if count == max_spans:
                continue
            for stop in range(start + 1, min(start + remove - removed, num_layers) + 1):
                span_cost = costs[start][stop]
                if math.isfinite(span_cost):
                    candidate = (cost + span_cost, count + 1, (*spans, Span(start, stop)))
                    offer(stop + 1, (count + 1, removed + stop - start), candidate)
    finished = [
        best
        for state in states[num_layers:]
        for (_, removed), best in state.items()
        if removed == remove
    ]
    if not finished or not 0 < remove < num_layers:
        raise ConfigError(
            f"No choice of at most {max_spans} spans of the lengths that are allowed, without "
            f"protected layers, removes exactly {remove} of {num_layers} layers. Remove fewer "
            "layers, allow more spans (selection.max_spans), other lengths (selection.min_length, "
            "selection.max_length) or protect fewer (selection.protect)."
        )
    return min(finished)[2]


def paper_span(scores: Sequence[float], remove: int, protect: Collection[int] = ()) -> Span:
    """The span of the largest score of starts 0 to L - n, the first of equals.

    The code of arXiv 2605.15491 never tries the first start and the last.
    """
    starts = [
        start
        for start in range(1, len(scores) - 1)
        if not any(start <= layer < start + remove for layer in protect)
    ]
    if not starts:
        raise ConfigError(
            f"No span of {remove} layers is a candidate with {len(set(protect))} protected "
            "layers. Remove fewer layers or protect fewer (selection.protect)."
        )
    start = max(starts, key=scores.__getitem__)
    return Span(start, start + remove)


def _projected_change(fold: PairMoments, projection_Cr: Tensor | None) -> Moments:
    """Moments of X against the projected changes ``(Y_p - X) R`` of all stops side by side."""
    width = len(fold.gram_CC)
    if projection_Cr is None:
        projection_Cr = torch.eye(width, dtype=torch.float64, device=fold.gram_CC.device)
        gram_projected_Cr = fold.gram_CC
    else:
        gram_projected_Cr = fold.gram_CC @ projection_Cr
    cross_CPr = fold.cross_CPr - gram_projected_Cr.unsqueeze(1)
    # ||Y R - X R||^2 = ||Y R||^2 - 2 (R'X'Y R) + (R'X'X R), column by column.
    sumsq_Pr = (
        fold.sumsq_target_Pr
        - 2 * (projection_Cr.unsqueeze(1) * fold.cross_CPr).sum(0)
        + (projection_Cr * gram_projected_Cr).sum(0)
    )
    num_targets = sumsq_Pr.numel()
    return Moments(
        num_tokens=fold.num_tokens,
        gram_ZZ=fold.gram_CC,
        cross_ZC=cross_CPr.reshape(width, num_targets),
        # Sums of the rows are not kept, and not asked for: they are for the variance.
        sum_z_Z=sumsq_Pr.new_zeros(width),
        sum_y_C=sumsq_Pr.new_zeros(num_targets),
        sumsq_y_C=sumsq_Pr.reshape(num_targets),
    )
