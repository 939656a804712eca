"""Fits that need the recovered model's own stream: sequential refit, and healing.

The dense and the recovered stream of all windows are carried from layer to layer side by side, so
each layer runs at most three times per window whatever the number of fits. They wait in host
memory: 2 T C numbers of the compute dtype for T calibration tokens (4.3 GB at T = 131072, C = 8192,
bf16). Nothing is kept of a stopped walk; it begins again from the operators.

The recovered stream is made by what was fitted before, so it tells windows that were fitted on from
others. One fold, the judge, is therefore left out of every fit, of the operators that a walk begins
with and of its own, and what a walk says of its fits is measured on that fold alone.

    dense       D_b  stream entering layer b of the dense model
    recovered   R_b  the same of the recovered one; it skips removed layers
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ghost_dist.checkpoint.load import Decoder
from ghost_dist.checkpoint.repair import Repair, apply_repair
from ghost_dist.config import RowWeights
from ghost_dist.solver.down_proj import refit_down
from ghost_dist.solver.least_squares import Fit
from ghost_dist.spans import Span
from ghost_dist.statistics.moments import Moments, MomentsAccumulator
from ghost_dist.statistics.row_weights import row_weights
from ghost_dist.statistics.span_sums import SampleKind, SpanCollector
from ghost_dist.statistics.sums import Sums

Tokens = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Refit:
    """One span fitted anew during a walk.

    Attributes
    ----------
    kind
        The sums that are taken.
    fit
        Sums of each fold to the new repair and its fit.
    """

    kind: SampleKind
    fit: Callable[[list[Mapping[str, Sums]]], tuple[Repair, Fit | None]]


@dataclass
class Walk:
    """One walk through the layers.

    Attributes
    ----------
    decoder
        All layers of the uncut model, or those up to the last stop, without its head.
    tokens
        int32, shape (windows, T).
    batch
        Windows per forward.
    spans
        What is removed.
    operators
        By span; replaced where ``refits`` says so.
    fold_of_window
        Fold of each window.
    judge
        The fold that nothing is fitted on.
    refittable
        Layers whose down_proj can be refitted.
    norm_eps
        Of the model's norms.
    refits
        By span; none where it starts at layer 0.
    row_weights
        Of healing.
    healed, fits, healing
        Filled by the walk: new down_proj weights, fits of refitted spans, what healing did.
    """

    decoder: Decoder
    tokens: Tokens
    batch: int
    spans: Sequence[Span]
    operators: dict[Span, Repair]
    fold_of_window: Sequence[int]
    judge: int
    refittable: frozenset[int]
    norm_eps: float
    refits: Mapping[Span, Refit] = field(default_factory=dict)
    row_weights: RowWeights = "none"
    healed: dict[int, Tensor] = field(default_factory=dict)
    fits: dict[Span, Fit | None] = field(default_factory=dict)
    healing: list[dict[str, Any]] = field(default_factory=list)

    @torch.inference_mode()
    def run(self, *, heal: bool = False, advance: Callable[[int], None] = lambda _: None) -> None:
        """Refit spans as they come, and heal.

        Parameters
        ----------
        heal
            Refit the down_proj of every kept layer behind the first span, but of those before a
            span whose operator has a new one or that is fitted again.
        advance
            Called with the number of layers that were passed.
        """
        boundary = max(0, self.spans[0].start - 1)
        self._dense = [s.cpu() for s in self._embed(boundary)]
        self._recovered = list(self._dense)
        last = self.decoder.num_layers if heal else self.spans[-1].stop
        starts = {span.start: span for span in self.spans}
        while boundary < last:
            span = starts.get(boundary)
            if span is not None:
                self._dense = self._through(self._dense, span.start, span.stop)
                self._recovered = self._at_boundary(self._recovered, self.operators[span])
                advance(span.stop - boundary)
                boundary = span.stop
                continue
            following = starts.get(boundary + 1)
            if following is not None and following in self.refits:
                self._refit(following)
            elif (
                heal
                and boundary >= self.spans[0].stop
                and boundary in self.refittable
                and (following is None or self.operators[following].down_FC is None)
            ):
                self._heal(boundary)
            self._dense = self._through(self._dense, boundary, boundary + 1)
            with self._new_down(boundary, following):
                self._recovered = self._through(self._recovered, boundary, boundary + 1)
            boundary += 1
            advance(1)

    def _embed(self, boundary: int) -> Iterator[Tensor]:
        """Streams entering a layer of the dense model, batch by batch."""
        seen: list[Tensor] = []

        def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[:] = [args[0] if args else kwargs["hidden_states"]]

        handle = self.decoder.layers[boundary].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for start in range(0, len(self.tokens), self.batch):
                rows = self.tokens[start : start + self.batch].astype(np.int64)
                with self.decoder.between(0, boundary + 1):
                    self.decoder(torch.from_numpy(rows).to(self.decoder.device))
                yield seen[0]
        finally:
            handle.remove()

    def _through(self, streams: list[Tensor], first: int, last: int) -> list[Tensor]:
        with self.decoder.between(first, last) as run:
            return [run(s.to(self.decoder.device)).cpu() for s in streams]

    def _at_boundary(self, streams: list[Tensor], repair: Repair) -> list[Tensor]:
        if not repair.boundary_parts():
            return streams
        # float64 statistics deserve no less; the exported operator rounds this once.
        wide = torch.promote_types(self.decoder.dtype, torch.float32)
        acting = repair.stored(wide, wide).to(self.decoder.device)
        return [apply_repair(acting, s.to(self.decoder.device)).to(s.dtype).cpu() for s in streams]

    @contextlib.contextmanager
    def _new_down(self, layer: int, following: Span | None) -> Iterator[None]:
        """The layer with the down_proj of the recovered model, where that is another one."""
        down_FC = self.healed.get(layer)
        if following is not None and self.operators[following].down_FC is not None:
            down_FC = self.operators[following].down_FC
        if down_FC is None:
            yield
            return
        module = self.decoder.down_projection(layer)
        original = module.weight
        try:
            weight = down_FC.T.to(original.device, original.dtype).contiguous()
            module.weight = nn.Parameter(weight, requires_grad=False)
            yield
        finally:
            module.weight = original

    def _refit(self, span: Span) -> None:
        """Fit a span anew; the streams are those entering layer ``start - 1``."""
        refit = self.refits[span]
        targets = self._through(self._dense, span.start - 1, span.stop)
        folds = self._sums(span, refit.kind, self._recovered, targets)
        self.operators[span], self.fits[span] = refit.fit(folds)

    def _sums(
        self, span: Span, kind: SampleKind, streams: list[Tensor], targets: list[Tensor]
    ) -> list[Mapping[str, Sums]]:
        """Sums of each fold: what a span's streams make of the layer before it, and its targets."""
        layer = span.start - 1
        inner = {}
        if kind.regressors == "joint":
            inner = {layer: self.decoder.down_projection(layer).in_features}
        collectors = [
            SpanCollector(
                [(span, kind)],
                self.decoder.hidden_size,
                self.decoder.device,
                inner_size=inner,
                norm_eps=self.norm_eps,
            )
            for _ in range(max(self.fold_of_window) + 1)
        ]
        window = 0
        for number, (x_BTC, h_BTF, product_BTC) in enumerate(self._taken_apart(layer, streams)):
            for row in range(len(x_BTC)):
                collector = collectors[self.fold_of_window[window]]
                if kind.regressors == "joint":
                    collector.take_mlp(layer, window, h_BTF[row], product_BTC[row])
                collector(span.start, window, x_BTC[row])
                collector(span.stop, window, targets[number][row].to(x_BTC.device))
                window += 1
        return [collector.result() for collector in collectors]

    def _heal(self, layer: int) -> None:
        """Refit one down_proj towards the dense stream entering the next layer."""
        down_FC = self._down(layer)
        accumulators = [
            MomentsAccumulator(down_FC.shape[0], down_FC.shape[1], self.decoder.device)
            for _ in range(max(self.fold_of_window) + 1)
        ]
        targets = self._through(self._dense, layer, layer + 1)
        window = 0
        taken = self._taken_apart(layer, self._recovered)
        for number, (x_BTC, h_BTF, product_BTC) in enumerate(taken):
            for row in range(len(x_BTC)):
                y_TC = targets[number][row].to(x_BTC.device)
                wide = torch.promote_types(y_TC.dtype, torch.float32)
                # A: the recovered stream without that product; what is left for it is Y - A.
                a_TC = x_BTC[row].to(wide) - product_BTC[row].to(wide)
                accumulators[self.fold_of_window[window]].add(
                    (h_BTF[row],),
                    y_TC.to(wide) - a_TC,
                    row_weights(self.row_weights, y_TC),
                )
                window += 1
        folds: list[Moments] = [accumulator.result() for accumulator in accumulators]
        repair, fit = refit_down(f"layer {layer}", folds, down_FC, "auto", judge=self.judge)
        better = fit.residual < 1
        if better:
            assert repair.down_FC is not None
            self.healed[layer] = repair.down_FC
        self.healing.append(
            {
                "layer": layer,
                "residual": fit.residual,
                "relative_ridge": fit.relative_ridge,
                "kept": better,
            }
        )

    def _taken_apart(
        self, layer: int, streams: list[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Streams through a layer: the stream behind it, H, and ``H @ down``.

        Without a down_proj H means nothing.
        """
        seen: list[Tensor] = []

        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            seen[:] = [args[0], output if module.bias is None else output - module.bias]

        handle = None
        if layer in self.refittable:
            handle = self.decoder.down_projection(layer).register_forward_hook(hook)
        try:
            with self.decoder.between(layer, layer + 1) as run:
                for stream in streams:
                    x_BTC = run(stream.to(self.decoder.device))
                    shape = (*x_BTC.shape[:2], -1)
                    h_BTF, product_BTC = seen or (x_BTC, x_BTC)
                    yield x_BTC, h_BTF.reshape(shape), product_BTC.reshape(shape)
        finally:
            if handle is not None:
                handle.remove()

    def _down(self, layer: int) -> Tensor:
        return self.decoder.down_projection(layer).weight.T.double()
