"""Fits that need the recovered model's own stream.

The dense and the recovered stream of all windows are carried from layer to layer side by side, each
layer at hand once, those before a span that is refitted twice. They wait in host
memory: 2 T C numbers of the compute dtype for T calibration tokens (4.3 GB at T = 131072, C = 8192,
bf16). Nothing is kept of a stopped walk; it begins again from the operators.

The recovered stream is made by what was fitted before, so it tells windows that were fitted on from
others. One fold, the judge, is therefore left out of every fit, of the operators that a walk begins
with and of its own, and what a walk says of its fits is measured on that fold alone.

    dense       D_b  stream entering layer b of the dense model
    recovered   R_b  the same of the recovered one; it skips removed layers
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ghost_dist.calibration.split import check_held_out
from ghost_dist.calibration.windows import Tokens, TokenWindows
from ghost_dist.checkpoint.repair import Repair, apply_repair
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.expert_parts import Inputs, RunLayer
from ghost_dist.engines.layerwise import Group, LayerwiseModel
from ghost_dist.pipeline.candidates import Candidate
from ghost_dist.pipeline.fitting import Fitted, RidgeFits, read_down
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.offloading import layers_of
from ghost_dist.pipeline.texts import fold_of_window
from ghost_dist.progress import Reporter
from ghost_dist.solver.least_squares import Detail, Fit
from ghost_dist.spans import Span
from ghost_dist.statistics.moments import Moments
from ghost_dist.statistics.span_sums import Regressors, SpanCollector, sums_key


@dataclass(frozen=True)
class Refit:
    """One span fitted anew during a walk: the sums taken, and what fits those of each fold."""

    kind: Regressors
    fit: Callable[[list[Moments]], tuple[Repair, Fit | None]]


class Step(NamedTuple):
    """What is done while a layer is at hand."""

    group: Group
    does: Literal["embed", "shared", "dense", "both", "refit", "look", "fit", "own"]
    span: Span | None = None  # that is refitted, or of which the layer is

    @property
    def passes(self) -> int:
        """Of all windows through the layer."""
        return {"embed": 0, "both": 2, "refit": 2}.get(self.does, 1)


def walk_steps(spans: Sequence[Span], refits: Collection[Span]) -> list[Step]:
    """All steps of a walk, in order; a layer before a span that is refitted comes again."""
    boundary = max(0, spans[0].start - 1)
    steps = [Step("embeddings", "embed"), *(Step(layer, "shared") for layer in range(boundary))]
    starts = {span.start: span for span in spans}
    while boundary < spans[-1].stop:
        span, following = starts.get(boundary), starts.get(boundary + 1)
        if span is not None:
            steps += [Step(layer, "dense", span) for layer in range(span.start, span.stop)]
            boundary = span.stop
        elif following is not None and following in refits:
            steps += [Step(layer, "dense") for layer in range(boundary, following.stop)]
            steps.append(Step(boundary, "refit", following))
            boundary = following.stop
        else:
            steps.append(Step(boundary, "both"))
            boundary += 1
    return steps


@dataclass
class LayerWalk:
    """Streams of all windows, in host memory, on their way through the layers, one at a time."""

    layers: LayerwiseModel
    tokens: Tokens
    batch: int
    fold_of_window: Sequence[int]

    def take(self, steps: Sequence[Step], advance: Callable[[int], None]) -> None:
        """Do steps; ``advance`` is called after each."""
        with self.layers.through([step.group for step in steps]) as at_hand:
            for _, step in zip(at_hand, steps, strict=True):
                self._do(step)
                self.layers.check_weights()
                advance(1)

    def _do(self, step: Step) -> None:
        raise NotImplementedError

    def _embedded(self) -> list[Tensor]:
        ids_WT = torch.from_numpy(self.tokens.astype(np.int64)).to(self.layers.device)
        return [self.layers.embed(ids_BT).cpu() for ids_BT in torch.split(ids_WT, self.batch)]

    def _inputs(self, streams: list[Tensor]) -> Inputs:
        return Inputs(streams, self.batch, self.layers.device)

    def _through(self, run: RunLayer, streams: list[Tensor]) -> list[Tensor]:
        return [run(stream.to(self.layers.device)).cpu() for stream in streams]

    def _taken_apart(
        self, run: RunLayer, module: Any, streams: list[Tensor], targets: list[Tensor]
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """By window its target, and of its stream through a layer: that behind it, H, ``H @ W``.

        H is what the module with the weight W gets; without a module (None) it means nothing.
        """
        seen: list[Tensor] = []

        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            seen[:] = [args[0], output if module.bias is None else output - module.bias]

        with contextlib.ExitStack() as stack:
            if module is not None:
                stack.enter_context(module.register_forward_hook(hook))
            window = 0
            for stream, target in zip(streams, targets, strict=True):
                x_BTC = run(stream.to(self.layers.device))
                shape = (*x_BTC.shape[:2], -1)
                inner = [part.reshape(shape) for part in seen or (x_BTC, x_BTC)]
                for rows in zip(target.to(x_BTC.device), x_BTC, *inner, strict=True):
                    yield window, *rows
                    window += 1


@dataclass(kw_only=True)
class Walk(LayerWalk):
    """One walk that refits spans as they come."""

    spans: Sequence[Span]
    operators: dict[Span, Repair]
    refits: Mapping[Span, Refit] = field(default_factory=dict)
    fits: dict[Span, Fit | None] = field(default_factory=dict)

    @property
    def steps(self) -> list[Step]:
        return walk_steps(self.spans, self.refits)

    def _do(self, step: Step) -> None:
        match step:
            case Step("embeddings"):
                self._recovered = self._dense = self._embedded()
            case Step(int(layer), "shared"):
                self._run(layer, recovered=False)
                self._recovered = self._dense
            case Step(int(layer), "dense", span):
                self._run(layer, recovered=False)
                if span is not None and layer == span.stop - 1:
                    self._apply(span)
            case Step(_, "refit", Span() as span):
                self._refit(span)
            case Step(int(layer)):
                self._run(layer)

    def _run(self, layer: int, *, dense: bool = True, recovered: bool = True) -> None:
        """Let a layer act on the streams."""
        streams = [*(self._dense if dense else ()), *(self._recovered if recovered else ())]
        with self.layers.running(layer, self._inputs(streams)) as run:
            if dense:
                self._dense = self._through(run, self._dense)
            if recovered:
                variant = Variant(tuple(self.spans), self.operators)
                with self.layers.as_in(variant, layer):
                    self._recovered = self._through(run, self._recovered)

    def _apply(self, span: Span) -> None:
        """Let an operator act on the recovered stream at its boundary."""
        repair, device = self.operators[span], self.layers.device
        if not repair.boundary_parts():
            return
        # float64 statistics deserve no less; the exported operator rounds this once.
        wide = torch.promote_types(self.layers.dtype, torch.float32)
        acting = repair.stored(wide, wide).to(device)
        self._recovered = [
            apply_repair(acting, stream.to(device)).to(stream.dtype).cpu()
            for stream in self._recovered
        ]

    def _refit(self, span: Span) -> None:
        """Fit a span anew; the dense stream is behind it, the other before layer ``start - 1``."""
        refit = self.refits[span]
        self.operators[span], self.fits[span] = refit.fit(self._sums(span, refit.kind))
        self._run(span.start - 1, dense=False)
        self._apply(span)

    def _sums(self, span: Span, kind: Regressors) -> list[Moments]:
        """Sums of each fold: what the layer before a span makes of the recovered stream, against
        the dense one behind it."""
        layer = span.start - 1
        module = self.layers.down_projection(layer) if kind == "joint" else None
        collectors = [
            SpanCollector(
                [(span, kind)],
                self.layers.hidden_size,
                self.layers.device,
                inner_size={} if module is None else {layer: module.in_features},
                norm_eps=self.layers.architecture.norm_eps,
            )
            for _ in range(max(self.fold_of_window) + 1)
        ]
        with self.layers.running(layer, self._inputs(self._recovered), tapped=True) as run:
            taken = self._taken_apart(run, module, self._recovered, self._dense)
            for window, y_TC, x_TC, h_TF, product_TC in taken:
                collector = collectors[self.fold_of_window[window]]
                if module is not None:
                    collector.take_mlp(layer, window, h_TF, product_TC)
                collector(span.start, window, x_TC)
                collector(span.stop, window, y_TC)
        return [collector.result()[sums_key(span, kind)] for collector in collectors]


def walk_behind(
    inputs: RunInputs,
    tokens: TokenWindows,
    reporter: Reporter,
    fitted: Mapping[Span, Fitted],
    chosen: Candidate,
    known: Mapping[Span, Fit | None] | None = None,
) -> Walk:
    """Fit every span but the first once more, behind fits without the last fold.

    ``known``: fits of such a walk, whose ridges are taken; then all folds are fitted on, and no fit
    says how good it is.

    Raises
    ------
    NotHeldOutError
        If a fit has seen the last fold.
    """
    judge = inputs.config.folds - 1
    for span, one in fitted.items() if known is None else ():
        check_held_out(one.folds, [judge], f"The stream behind {span}")
    with layers_of(inputs, tokens.tokens.shape, 2) as layers:
        walk = Walk(
            layers=layers,
            tokens=tokens.tokens,
            batch=inputs.batch,
            spans=tuple(fitted),
            operators={span: one.repair for span, one in fitted.items()},
            fold_of_window=fold_of_window(inputs, tokens),
            refits=_refits(inputs, tuple(fitted), chosen, known),
        )
        with reporter.stage("refit", len(walk.steps), "layers") as advance:
            walk.take(walk.steps, advance)
    return walk


def _refits(
    inputs: RunInputs,
    spans: Sequence[Span],
    chosen: Candidate,
    known: Mapping[Span, Fit | None] | None,
) -> dict[Span, Refit]:
    """How every span but the first is fitted on the recovered stream."""
    architecture, refits = inputs.architecture, dict[Span, Refit]()
    judge = inputs.config.folds - 1 if known is None else None
    detail: Detail = "all" if known is None else "map"

    def fit(here: Candidate, span: Span, folds: Sequence[Moments]) -> tuple[Repair, Fit | None]:
        down_FC = None
        if here.kind() == "joint":
            down_FC = read_down(inputs.source, architecture, span.start - 1, inputs.device)
        ridges, picked = RidgeFits(architecture.norm_eps), tuple(range(len(folds)))
        repair, found = ridges.fit(here, span, folds, down_FC, picked, judge, detail)
        return repair.to(torch.device("cpu")), found

    for span in spans[1:]:
        here = chosen.at(span, inputs.refittable).with_ridge_of((known or {}).get(span))
        if (kind := here.kind()) is not None:
            refits[span] = Refit(kind, partial(fit, here, span))
    return refits
