"""What an attention or an MLP left is closed by the matrix that wrote to the stream before it.

    x  = A + H W            the recovered stream behind the half before the gap
    y                       the dense stream behind the gap
    W' = argmin ||H W' - (y - A)||^2, shrunk to W

so no parameter is added. Gaps are fitted in order, each on the recovered stream with those before
it closed. The dense and the recovered stream of all windows wait in host memory, as in
``walking.py``; one fold, the judge, is left out of every fit, and a matrix that is no better on it
stays. Where nothing writes to the stream before a gap (the model's beginning, an operator, a norm
behind the matrix) it stays open.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.surgery import operator_as_computed, repair_stream
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.expert_parts import RunLayer
from ghost_dist.export.operator_files import save_output
from ghost_dist.pipeline.candidates import Candidate
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.offloading import layers_of
from ghost_dist.pipeline.solving import Solved
from ghost_dist.pipeline.texts import fold_of_window
from ghost_dist.pipeline.walking import LayerWalk, Step
from ghost_dist.progress import Reporter
from ghost_dist.solver.least_squares import fit_least_squares
from ghost_dist.spans import PARTS, Sublayer
from ghost_dist.statistics.moments import MomentsAccumulator


def gaps(variant: Variant, architecture: Architecture) -> dict[Sublayer, tuple[int, bool]]:
    """What is before each gap that can be closed, to where the gap ends.

    That is the stream entering a layer, or, where the flag is set, the one behind its attention.
    """
    halves = [Sublayer(la, part) for la in range(architecture.num_layers) for part in PARTS]
    gone = frozenset(variant.sublayers)
    found = {}
    for number, before in enumerate(halves):
        if before in gone or before.layer in variant.removed:
            continue
        end = number + 1
        while end < len(halves) and halves[end] in gone:
            end += 1
        half = architecture.halves.get(before.layer, {}).get(before.part)
        if end > number + 1 and half is not None and half.writer_tensor:
            found[before] = (end // 2, bool(end % 2))
    return found


def gap_steps(variant: Variant, architecture: Architecture) -> list[Step]:
    """All steps in order; the dense stream goes ahead to the end of a gap before it is closed."""
    ends = {before.layer: end for before, end in gaps(variant, architecture).items()}
    if not ends:
        return []
    first = variant.first_changed
    assert first is not None, "there is a gap"
    start = min(first, *ends)
    steps = [Step("embeddings", "embed"), *(Step(layer, "shared") for layer in range(start))]
    dense = start
    for layer in range(start, max(ends) + 1):
        if layer in ends:
            stop, inside = ends[layer]
            steps += [Step(ahead, "dense") for ahead in range(dense, stop)]
            dense = max(dense, stop)
            steps += [Step(stop, "look")] if inside else []
            steps.append(Step(layer, "fit"))
        if layer not in variant.removed:
            steps.append(Step(layer, "own"))
        elif layer in {span.stop - 1 for span in variant.spans}:
            steps.append(Step(layer, "own"))  # the operator
    return steps


@dataclass(kw_only=True)
class CloseGaps(LayerWalk):
    """Fits the matrices before all gaps of a variant, on no window of the fold ``judge``.

    ``outputs`` and ``rows`` are there behind ``gap_steps``: the new matrices (in, C), float64, and
    how each did on the judge.
    """

    judge: int
    variant: Variant
    outputs: dict[Sublayer, Tensor] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._before = {one.layer: one for one in gaps(self.variant, self.layers.architecture)}
        self._operators = {
            span.stop - 1: operator_as_computed(one, self.layers.dtype, self.layers.device)
            for span, one in self.variant.at_boundary.items()
        }

    def _do(self, step: Step) -> None:
        layer = step.group
        if not isinstance(layer, int):
            self._own = self._dense = self._embedded()
        elif step.does == "shared":
            self._own = self._target = self._dense = self._behind(layer, self._dense, Variant())
        elif step.does == "dense":
            self._target = self._dense = self._behind(layer, self._dense, Variant())
        elif step.does == "look":
            half = Variant(sublayers=(Sublayer(layer, "mlp"),))
            self._target = self._behind(layer, self._dense, half)
        elif step.does == "fit":
            self._fit(layer)
        elif layer in self.variant.removed:
            if layer in self._operators:
                acting, device = self._operators[layer], self.layers.device
                self._own = [repair_stream(acting, x.to(device)).cpu() for x in self._own]
        else:
            self._own = self._behind(layer, self._own, self._now)

    @property
    def _now(self) -> Variant:
        return replace(self.variant, outputs=self.outputs)

    def _behind(self, layer: int, streams: list[Tensor], variant: Variant) -> list[Tensor]:
        with self._running(layer, streams, variant) as run:
            return self._through(run, streams)

    @contextlib.contextmanager
    def _running(self, layer: int, streams: list[Tensor], variant: Variant) -> Iterator[RunLayer]:
        gone = [one for one in variant.sublayers if one.layer == layer]
        with (
            self.layers.without(gone),
            self.layers.running(layer, self._inputs(streams), tapped=True) as run,
            self.layers.as_in(variant, layer),
        ):
            yield run

    def _fit(self, layer: int) -> None:
        """Another W (in, C) before a gap, behind which the own stream is nearer to the dense one;
        kept if on the judge it is better.
        """
        before = self._before[layer]
        module = self.layers.writer(before)
        with self._running(layer, self._own, self._now) as run:
            weight_FC: Tensor = module.weight.T.double()
            accumulators = [
                MomentsAccumulator(weight_FC.shape[0], weight_FC.shape[1], self.layers.device)
                for _ in range(max(self.fold_of_window) + 1)
            ]
            taken = self._taken_apart(run, module, self._own, self._target)
            for window, y_TC, x_TC, h_TF, product_TC in taken:
                wide = torch.promote_types(y_TC.dtype, torch.float32)
                # A: the recovered stream without that product; what is left for it is Y - A.
                a_TC = x_TC.to(wide) - product_TC.to(wide)
                accumulators[self.fold_of_window[window]].add((h_TF,), y_TC.to(wide) - a_TC)
            folds = [accumulator.result() for accumulator in accumulators]
            new_FC, fit = fit_least_squares(str(before), folds, weight_FC, "auto", judge=self.judge)
        kept = fit.residual < 1  # else the original is the better one
        if kept:
            self.outputs[before] = new_FC.cpu()
        row = {"residual": fit.residual, "relative_ridge": fit.relative_ridge, "kept": kept}
        self.rows.append({"before": str(before), **row})


def nothing_solved(folds: int) -> Solved:
    """Where only halves of layers go: no operator."""
    cut = Candidate("none")
    table = [{**cut.described(), "chosen": True}]
    return Solved(cut, {}, {}, tuple(range(folds - 1)), table)


def close_gaps(
    inputs: RunInputs,
    variant: Variant,
    tokens: TokenWindows,
    folder: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """New matrices before the gaps of a run's model, in files of a folder: what is recorded."""
    steps = gap_steps(variant, inputs.architecture)
    if not steps:
        return {"gaps": [], "outputs": {}}
    with (
        layers_of(inputs, tokens.tokens.shape, 2) as layers,
        reporter.stage("close gaps", len(steps), "layers") as advance,
    ):
        closing = CloseGaps(
            layers,
            tokens.tokens,
            inputs.batch,
            fold_of_window(inputs, tokens),
            judge=inputs.config.folds - 1,
            variant=variant,
        )
        closing.take(steps, advance)
    files = {str(one): save_output(folder, one, new) for one, new in closing.outputs.items()}
    return {"gaps": closing.rows, "outputs": files}
