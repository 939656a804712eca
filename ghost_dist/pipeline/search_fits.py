"""Operators of a search: from dense streams, and from the own recovered stream of a removal."""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ghost_dist.calibration.split import spread
from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.surgery import operator_as_computed, repair_stream
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.devices import free_bytes
from ghost_dist.engines.expert_parts import Inputs
from ghost_dist.engines.layerwise import Group, LayerwiseModel
from ghost_dist.engines.sweep import Tap, sweep
from ghost_dist.errors import ConfigError
from ghost_dist.progress import Advance
from ghost_dist.solver.least_squares import add_all, cholesky_factor, ridge_scale, singular, solve
from ghost_dist.spans import Span
from ghost_dist.statistics.moments import Moments, MomentsAccumulator, add_product
from ghost_dist.statistics.span_sums import FiniteCheck
from ghost_dist.statistics.sums import mirror_

SHARE_OF_MEMORY = 0.4  # for dense streams; for streams of variants; for operators
WALKED_TOKENS = 1 << 15  # of dense streams, that are carried on
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # relative
_OPERATORS_OF_LAYER = 8  # that should have room on the device
_FLUSH_TOKENS = 8192
"""Rows summed in float32 at a time on a GPU; windows are put together until there are as many. Its
2e-5 of the correlation scale is enough to choose among spans."""

Spans = tuple[Span, ...]
Doing = Callable[[str], None]
"""As ``Reporter.doing``."""


class DenseFits:
    """``ghost`` operators in the model's dtype, by span, each fitted once from dense streams: one
    for each source, without it.

    ``streams`` are by boundary, (W, T, C), ``source_of`` is by window.
    """

    def __init__(
        self, streams: Sequence[Tensor], source_of: Sequence[int], model: LayerwiseModel
    ) -> None:
        self.streams, self.model = streams, model
        self.ridges: dict[Span, float] = {}  # relative, of least residual
        self.source_of = source_of
        self._weights: OrderedDict[Span, list[Repair]] = OrderedDict()
        one = len(set(source_of)) * model.hidden_size**2 * model.dtype.itemsize
        self._place, self.room = model.device, 0  # of so many spans
        if model.whole:
            self.room = int(SHARE_OF_MEMORY * free_bytes(model.device)) // one
        if self.room < _OPERATORS_OF_LAYER * model.num_layers:
            self._place = torch.device("cpu")
            self.room = int(SHARE_OF_MEMORY * free_bytes(self._place)) // one

    def fit(self, removals: Collection[Spans], doing: Doing = lambda _: None) -> None:
        """Have all that these need; those not used for longest go where memory is short."""
        spans = {span for of_one in removals for span in of_one}
        stops: dict[int, list[int]] = {}
        for span in sorted(spans):
            if span in self._weights:
                self._weights.move_to_end(span)
            else:
                stops.setdefault(span.start, []).append(span.stop)
        done, needed = 0, sum(map(len, stops.values()))
        for start, of_start in stops.items():
            doing(f"fit {done + 1}/{needed}")
            done += len(of_start)
            sources = sorted(set(self.source_of))
            parts = [self._changes(start, of_start, source) for source in sources]
            found = cross_fit_start(start, of_start, parts, _RIDGES)
            for span, (weights, ridge) in found.items():
                self._weights[span] = [self.stored(one) for one in weights]
                self.ridges[span] = ridge
        doing("")
        while len(self._weights) > max(self.room, len(spans)):
            self._weights.popitem(last=False)

    def stored(self, weight_CC: Tensor) -> Repair:
        """An operator as it is kept: in nn.Linear's layout in memory, which a sweep wants."""
        stored_CC = weight_CC.to(self.model.dtype).T.contiguous().T
        return Repair(weight_CC=stored_CC.to(self._place))

    def variants(self, removals: Sequence[Spans], source: int) -> list[Variant]:
        """Removals with their operators, which were fitted, without a source."""
        return [
            Variant(spans, {span: self._weights[span][source] for span in spans})
            for spans in removals
        ]

    def _changes(self, start: int, stops: Sequence[int], source: int) -> Moments:
        """Of a source's stream entering ``start``, against its changes up to all stops side by
        side."""
        windows = [window for window, of in enumerate(self.source_of) if of == source]
        device, width = self.model.device, self.model.hidden_size
        num_targets = width * len(stops)
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        gram_CC, cross_CN = zeros(width, width), zeros(width, num_targets)
        sumsq_N, length = zeros(num_targets), self.streams[start].shape[1]
        float64 = device.type != "cuda"
        wide = torch.float64 if float64 else torch.float32
        at_once = 1 if float64 else -(-_FLUSH_TOKENS // length)
        add = partial(add_product, float64_products=float64, flush_tokens=_FLUSH_TOKENS)
        for first in range(0, len(windows), at_once):
            some = windows[first : first + at_once]
            x_TC, *targets = (
                self.streams[boundary][some].flatten(0, 1).to(device)
                for boundary in (start, *stops)
            )
            targets_TN = torch.cat(targets, dim=1)
            if float64:
                x_TC, targets_TN = x_TC.double(), targets_TN.double()
            add(gram_CC, x_TC, x_TC)
            add(cross_CN, x_TC, targets_TN)
            sumsq_N += torch.linalg.vector_norm(targets_TN, dim=0, dtype=wide).double().square()
        mirror_(gram_CC)
        of_stops = cross_CN.view(width, len(stops), width)
        # ||Y - X||^2 = ||Y||^2 - 2 X'Y + X'X, column by column.
        sumsq_PC = sumsq_N.view(len(stops), width) - 2 * of_stops.diagonal(dim1=0, dim2=2)
        sumsq_PC += gram_CC.diagonal()
        of_stops -= gram_CC.unsqueeze(1)
        return Moments(
            num_tokens=len(windows) * length,
            gram_ZZ=gram_CC,
            cross_ZC=cross_CN,
            # Sums of the rows are not asked for: they are for the variance.
            sum_z_Z=zeros(width),
            sum_y_C=zeros(num_targets),
            sumsq_y_C=sumsq_PC.flatten(),
        )


def cross_fit_start(
    start: int, stops: Sequence[int], parts: Sequence[Moments], ridges: Sequence[float]
) -> dict[Span, tuple[list[Tensor], float]]:
    """W (C, C) of every span of one start, for each part one that is fitted on the other parts.

    With it the relative ridge of least residual on the parts left out; or the plain cut. ``parts``:
    sums of disjoint windows, with the changes up to all stops side by side as targets.
    """
    total = add_all(parts)
    others = [total - part for part in parts]
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
            for part, other, factor_CC in zip(parts, others, factored, strict=True):
                map_CC = torch.cholesky_solve(other.cross_ZC[:, columns], factor_CC)
                maps.append(map_CC)
                product_CC = part.gram_ZZ @ map_CC - 2 * part.cross_ZC[:, columns]
                of_parts.append(part.sumsq_y_C[columns].sum() + (map_CC * product_CC).sum())
            tried.append(maps)
            residuals.append(torch.stack(of_parts).sum())
        cut, *of_ridge = torch.stack(residuals).tolist()
        best = of_ridge.index(min(of_ridge))
        maps = tried[best + 1] if of_ridge[best] < cut else tried[0]
        found[Span(start, stop)] = [eye_CC + map_CC for map_CC in maps], [*factors][best]
    return found


class PlainCuts:
    """No operators at all, in the place of fits."""

    def fit(self, removals: Collection[Spans], doing: Doing = lambda _: None) -> None:
        """Nothing to do."""

    def variants(self, removals: Sequence[Spans], _: int) -> list[Variant]:
        """Removals as they are."""
        return [Variant(spans) for spans in removals]


class SequentialFits:
    """``ghost`` operators of removals, each fitted on the stream that those before it have made.

    There is one for each part of the sources, fitted on the windows of the others. It hangs on the
    spans up to its own, so removals that begin alike share what is fitted and run up to there. The
    ridge of a span is that of its fit from dense streams, for as many tokens.
    """

    def __init__(self, dense: DenseFits, parts: int, batch: int) -> None:
        self._dense, self._model, self._batch = dense, dense.model, batch
        part_of = [source % parts for source in dense.source_of]
        num_windows, length, _ = dense.streams[0].shape
        walked = spread(range(num_windows), max(2 * parts, WALKED_TOKENS // length))
        self._windows = [
            torch.tensor([w for w in walked if part_of[w] != part], device=dense.streams[0].device)
            for part in range(parts)
        ]
        # The best penalty hardly depends on the tokens, so relative to their sums it does.
        sources = len(set(dense.source_of))
        self._ridges = num_windows * (1 - 1 / sources) / (len(walked) * (1 - 1 / parts))
        self._fitted: OrderedDict[Spans, list[Repair]] = OrderedDict()  # that of the last span
        removal = (len(self._windows) - 1) * dense.streams[0].nbytes  # streams on their way
        free = free_bytes(dense.streams[0].device)
        self._at_once = max(1, int(SHARE_OF_MEMORY * free) // max(1, removal) - 1)

    def variants(self, removals: Sequence[Spans], part: int) -> list[Variant]:
        """Removals with their operators, which were fitted, without a part of the sources."""
        return [
            Variant(
                spans,
                {span: self._fitted[spans[:n]][part] for n, span in enumerate(spans, start=1)},
            )
            for spans in removals
        ]

    def fit(self, removals: Sequence[Spans], doing: Doing = lambda _: None) -> None:
        """Have the operators of all of these."""
        self._dense.fit(removals, doing)
        wanted = _beginnings(removals)
        for spans in sorted(wanted & self._fitted.keys()):
            self._fitted.move_to_end(spans)
        missing = sorted(
            {spans for spans in removals if not _beginnings([spans]) <= self._fitted.keys()}
        )
        for first in range(0, len(missing), self._at_once):
            doing(f"refit {first + 1}/{len(missing)}")
            self._walk(missing[first : first + self._at_once])
        doing("")
        while len(self._fitted) > max(self._dense.room, len(wanted)):
            self._fitted.popitem(last=False)

    def _walk(self, removals: Sequence[Spans]) -> None:
        """Carry the fit windows through the recovered models, as far as an operator needs them."""
        following: dict[Spans, list[Spans]] = {}
        for spans in sorted(_beginnings(removals)):
            following.setdefault(spans[:-1], []).append(spans)
        ends = {of: max(s[-1].start for s in them) for of, them in following.items() if of}
        layers: list[Group] = sorted({k for of in ends for k in range(of[-1].stop, ends[of])})
        streams: dict[Spans, list[Tensor]] = {}  # behind the last operator
        waiting: dict[int, dict[Spans, list[Tensor]]] = {}  # by boundary at which they go on
        boundary = -1

        def fit_up_to(last: int) -> None:
            nonlocal boundary
            while boundary < last:
                boundary += 1
                streams.update(waiting.pop(boundary, {}))
                for before in [(), *streams]:
                    for spans in following[before]:
                        if spans[-1].start == boundary:
                            given = streams[before] if before else self._dense_streams(boundary)
                            self._fit(spans, given)
                            if spans in ends:
                                made = self._repaired(spans, given)
                                waiting.setdefault(spans[-1].stop, {})[spans] = made
                for before in [before for before in streams if ends[before] == boundary]:
                    del streams[before]

        with self._model.through(layers) as at_hand:
            for layer in at_hand:
                assert isinstance(layer, int)
                fit_up_to(layer)
                on = [one for of_parts in streams.values() for one in of_parts]
                inputs = Inputs(on, self._batch, self._model.device)
                with self._model.running(layer, inputs) as run:
                    for stream_WTC in on:
                        for part_BTC in torch.split(stream_WTC, self._batch):
                            part_BTC.copy_(run(part_BTC.to(self._model.device)))
                self._model.check_weights()
            fit_up_to(self._model.num_layers - 1)

    def _dense_streams(self, boundary: int) -> list[Tensor]:
        """By part, those of the others, (W, T, C)."""
        return [self._dense.streams[boundary][windows_W] for windows_W in self._windows]

    def _fit(self, spans: Spans, streams: Sequence[Tensor]) -> None:
        """The operator of the last span, from the streams before it to the dense ones behind it."""
        found, device, ridge = [], self._model.device, self._ridges * self._dense.ridges[spans[-1]]
        for x_WTC, y_WTC in zip(streams, self._dense_streams(spans[-1].stop), strict=True):
            sums = MomentsAccumulator(x_WTC.shape[2], x_WTC.shape[2], device)
            for x_TC, y_TC in zip(x_WTC, y_WTC, strict=True):
                sums.add((x_TC.to(device),), y_TC.to(device))
            moments = sums.result()
            change = replace(moments, cross_ZC=moments.cross_ZC - moments.gram_ZZ)
            penalty_C = ridge * ridge_scale(moments.gram_ZZ)
            weight_CC = solve(str(spans[-1]), change, penalty_C)
            weight_CC.diagonal().add_(1)
            found.append(self._dense.stored(weight_CC))
        self._fitted[spans] = found

    def _repaired(self, spans: Spans, streams: Sequence[Tensor]) -> list[Tensor]:
        """What the last span's operators make of the streams before it."""
        made = [torch.empty_like(stream_WTC) for stream_WTC in streams]
        for repair, given, new in zip(self._fitted[spans], streams, made, strict=True):
            acting = operator_as_computed(repair, self._model.dtype, self._model.device)
            for x_BTC, y_BTC in zip(
                *(torch.split(of, self._batch) for of in (given, new)), strict=True
            ):
                y_BTC.copy_(repair_stream(acting, x_BTC.to(self._model.device)))
        return made


def _beginnings(removals: Collection[Spans]) -> set[Spans]:
    return {spans[:number] for spans in removals for number in range(1, len(spans) + 1)}


class _Keep(Tap):
    """Copies the dense streams of every boundary."""

    def __init__(self, kept: Sequence[Tensor]) -> None:
        self._kept, self.finite = kept, FiniteCheck()

    def stream(self, boundary: int, part: slice, stream_BTC: Tensor) -> None:
        """A batch."""
        for window, stream_TC in zip(range(part.start, part.stop), stream_BTC, strict=True):
            self.finite.note(boundary, window, stream_TC)
        self._kept[boundary][part] = stream_BTC.to(self._kept[boundary].device)


def dense_streams(
    model: LayerwiseModel, tokens: Tokens, batch: int, advance: Advance, on_host: int
) -> list[Tensor]:
    """Streams (W, T, C) of every boundary, on the device if they fit there, else on the host.

    ``on_host``: processes that keep as much there.
    """
    shape = (*tokens.shape, model.hidden_size)
    nbytes = (model.num_layers + 1) * math.prod(shape) * model.dtype.itemsize
    place, host = model.device, torch.device("cpu")
    if nbytes + model.bytes_at_once() > SHARE_OF_MEMORY * free_bytes(place):
        place = host
    if place == host and on_host * nbytes > SHARE_OF_MEMORY * free_bytes(host):
        raise ConfigError(
            f"selection.criterion=search keeps the streams of {tokens.size:,} tokens at "
            f"{model.num_layers + 1} boundaries, {nbytes / 1e9:.1f} GB"
            f"{f' in each of {on_host} ranks' if on_host > 1 else ''}, and the host has "
            f"{free_bytes(place) / 1e9:.1f} GB free. Give selection.effort=quick, fewer ranks "
            "on a host, or another criterion."
        )
    kept = [
        torch.empty(shape, dtype=model.dtype, device=place) for _ in range(model.num_layers + 1)
    ]
    keep = _Keep(kept)
    stop = model.num_layers
    sweep(model, [Variant()], tokens, [keep], batch=batch, stop=stop, advance=advance)
    keep.finite.check()
    return kept
