"""Which attentions, MLPs and layers go by ``selection.units``: removals scored with their repairs.

Whole layers have the operators of ``searching.py``. A half that goes is repaired by the matrix that
wrote to the stream before it: by what of the half's own output can be had from that matrix's input,

    dW = argmin ||H dW - D||^2 + ridge ||dW||^2

with H and D of the dense model, so that it is fitted once, and what several halves behind one
matrix need adds up. ``gaps.py`` fits the chosen ones anew, on the recovered stream.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.checkpoint.architecture import check_cut
from ghost_dist.checkpoint.halves import check_halves
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.config import parse_size
from ghost_dist.devices import free_bytes
from ghost_dist.durable import fingerprint
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.errors import ConfigError, UnsupportedArchitectureError
from ghost_dist.evaluation.scores import window_scores
from ghost_dist.pipeline.gaps import gaps
from ghost_dist.pipeline.inputs import RunInputs
from ghost_dist.pipeline.search_fits import DenseFits
from ghost_dist.pipeline.searching import EFFORTS, Scoring, record_of, scoring
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import RunFolder
from ghost_dist.solver.removals import Removal
from ghost_dist.solver.search import table_as_plain, table_from_plain
from ghost_dist.solver.unit_search import UnitSearch
from ghost_dist.spans import PARTS, Span, Sublayer, check_units

_RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # relative to the median of the gram's diagonal
_SHARE_OF_MEMORY = 0.2  # for repairs
_WIDER = 3  # times as many removals of a generation as of whole layers: there are as many units
_EXCHANGES = {"quick": 0, "normal": 8, "thorough": 24}

_Units = tuple[tuple[Span, ...], tuple[Sublayer, ...]]


def search_units(
    inputs: RunInputs, tokens: TokenWindows, run: RunFolder, reporter: Reporter
) -> tuple[tuple[Span, ...], tuple[Sublayer, ...], dict[str, Any]]:
    """Spans and halves that go, and what was searched as plain values."""
    selection, architecture = inputs.config.selection, inputs.architecture
    if inputs.streaming:
        raise ConfigError(
            f"selection.units={selection.units} searches on a model that is held as a whole, and "
            "this one is read layer by layer. Give selection.units=layers, or "
            "selection.sublayers."
        )
    record = record_of(inputs)
    wanted = selection.model_dump(mode="json", exclude={"criterion", "spans"})
    texts = [tokens.fingerprint, inputs.config.left_out]
    identity = fingerprint([wanted, "sure_kl", inputs.model_fingerprint, texts, inputs.numerics])
    kept = run.record(record, identity) or {"table": {}}
    shown = 0

    def allow(removal: Removal) -> bool:
        spans, halves = units_of(removal)
        try:
            check_cut(architecture, inputs.source.config, spans)
            check_halves(architecture, inputs.source.config, spans, halves)
        except UnsupportedArchitectureError:
            return False
        return True

    def told(generation: dict[str, Any]) -> None:
        nonlocal shown
        run.finish(record, identity, {"table": table_as_plain(search.table)})
        reporter.event("search-generation", **generation)
        advance(search.evaluations - shown)
        shown = search.evaluations

    name = "normal" if isinstance(selection.effort, int) else selection.effort
    width = EFFORTS[name].width or 2 * architecture.num_layers
    with scoring(inputs, tokens, reporter) as layers:
        score = UnitScoring(layers, HalfRepairs(layers))
        halves = score.numbers
        target = target_numbers(inputs)
        search = UnitSearch(
            _units(inputs),
            score.net,
            target,
            score,
            replace(layers.windows.judges, rough=False),
            slack=min(halves.values()) // 2,
            width=_WIDER * width,
            exchanges=_EXCHANGES[name],
            allow=allow,
            table=table_from_plain(kept["table"]),
            after_generation=told,
        )
        with reporter.stage("search", search.likely, "evaluations") as advance:
            found = search.run()
    spans, sublayers = units_of(found.removal)
    return (
        spans,
        sublayers,
        {
            "search": {
                "kl": found.score,
                "kl_left_out": list(found.scores),
                "evaluations": found.evaluations,
                "candidates": found.candidates,
                "judged_tokens": int(layers.windows.judged.size),
                "fitted_tokens": int(layers.windows.fitted.size),
                "target": target,
                "parameters": score.net(found.removal),
                "generations": list(found.generations),
            }
        },
    )


def units_of(removal: Removal) -> _Units:
    """Spans and halves of a removal."""
    halves = [Sublayer(half // 2, PARTS[half % 2]) for half in removal]
    return check_units((), halves, 1 << 30)


def target_numbers(inputs: RunInputs) -> int:
    """Parameters that should go: a share of all, bytes, or as many as so many layers have."""
    remove = inputs.config.selection.remove
    if isinstance(remove, str):
        unit, size = parse_size(remove)
        if unit != "fraction":
            return int(size) // inputs.source.dtype.itemsize
        return int(size * sum(math.prod(t.shape) for t in inputs.source.tensors.values()))
    assert remove is not None
    halves = inputs.architecture.halves
    return remove * sum(h.numbers for of in halves.values() for h in of.values()) // len(halves)


def _units(inputs: RunInputs) -> list[Removal]:
    architecture, selection = inputs.architecture, inputs.config.selection
    layers = [la for la in architecture.halves if la not in selection.protect]
    units: list[Removal] = [(2 * layer + half,) for layer in layers for half in (0, 1)]
    if selection.units == "auto":
        whole = [la for la in range(architecture.num_layers) if la not in selection.protect]
        units += [(2 * layer, 2 * layer + 1) for layer in whole]
    return units


class HalfRepairs:
    """Matrices before halves that go, one for each source without it, fitted once."""

    def __init__(self, scoring: Scoring) -> None:
        assert isinstance(scoring.dense, DenseFits)
        self._model, self._streams = scoring.model, scoring.dense.streams
        self._source_of = scoring.windows.source_of
        self._sources = sorted(set(self._source_of))
        self._changes: OrderedDict[tuple[Sublayer, Sublayer], list[Tensor]] = OrderedDict()
        self._weights: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def fit(self, variants: Collection[Variant]) -> None:
        """Have all that these need."""
        missing: dict[Sublayer, set[Sublayer]] = {}
        for variant in variants:
            for before, gone in self._needs(variant).items():
                new = {half for half in gone if (before, half) not in self._changes}
                missing.setdefault(before, set()).update(new)
        with self._model.through([]):
            for before, halves in sorted(missing.items()):
                if halves:
                    self._fit(before, sorted(halves))

    def outputs(self, variant: Variant, source: int) -> dict[Sublayer, Tensor]:
        """New matrices (in, C) of a variant, without a source."""
        found = {}
        for before, gone in self._needs(variant).items():
            key = (before, tuple(gone), source)
            if key not in self._weights:
                own_FC = self._model.writer(before).weight.T.float()
                changes = [self._changes[before, half][source] for half in gone]
                new_FC = own_FC + torch.stack(changes).sum(0).to(own_FC.device)
                self._weights[key] = new_FC.to(self._model.dtype)
            self._weights.move_to_end(key)
            found[before] = self._weights[key]
        room = _SHARE_OF_MEMORY * free_bytes(self._model.device)
        while self._weights and sum(w.nbytes for w in self._weights.values()) > room + sum(
            w.nbytes for w in found.values()
        ):
            self._weights.popitem(last=False)
        return found

    def _needs(self, variant: Variant) -> dict[Sublayer, list[Sublayer]]:
        gone = variant.sublayers
        needs = {}
        for before, (layer, inside) in gaps(variant, self._model.architecture).items():
            end = Sublayer(layer, "mlp") if inside else Sublayer(layer, "attention")
            needs[before] = [one for one in gone if before < one < end]
        return needs

    def _fit(self, before: Sublayer, gone: Sequence[Sublayer]) -> None:
        module, seen = self._model.writer(before), []
        grams: list[Tensor] = []
        crosses: list[list[Tensor]] = []
        outputs = {half: self._output(half) for half in gone}
        with module.register_forward_hook(lambda _m, args, _o: seen.append(args[0])):
            for source in self._sources:
                h_TF = self._inputs(before, source, seen)
                grams.append(h_TF.T @ h_TF)
                rows = [w for w, of in enumerate(self._source_of) if of == source]
                added = [outputs[half][rows].flatten(0, 1).double() for half in gone]
                crosses.append([h_TF.T @ added_TC for added_TC in added])
        for number, half in enumerate(gone):
            of_half = [cross[number] for cross in crosses]
            self._changes[before, half] = [
                change.float().cpu() for change in _cross_fit(grams, of_half)
            ]

    def _inputs(self, before: Sublayer, source: int, seen: list[Tensor]) -> Tensor:
        seen.clear()
        rows = [w for w, of in enumerate(self._source_of) if of == source]
        with self._model.running(before.layer, tapped=True) as run:
            for row in rows:
                run(self._streams[before.layer][row][None].to(self._model.device))
        return torch.cat([h.reshape(-1, h.shape[-1]) for h in seen]).double()

    def _output(self, half: Sublayer) -> Tensor:
        """What a half adds to the dense stream, (W, T, C)."""
        streams, layer = self._streams, half.layer
        without = Sublayer(layer, "mlp")
        found = []
        with self._model.without([without]), self._model.running(layer, tapped=True) as run:
            for x_TC, y_TC in zip(streams[layer], streams[layer + 1], strict=True):
                x_TC, y_TC = x_TC.to(self._model.device), y_TC.to(self._model.device)
                between_TC = run(x_TC[None])[0]
                found.append(between_TC - x_TC if half.part == "attention" else y_TC - between_TC)
        return torch.stack(found)


def _cross_fit(grams: Sequence[Tensor], crosses: Sequence[Tensor]) -> list[Tensor]:
    """The solution without each part, of the ridge that does best on the first one left out."""
    alone = len(grams) == 1
    total_FF, total_FC = torch.stack(list(grams)).sum(0), torch.stack(list(crosses)).sum(0)

    def without(number: int, relative: float) -> Tensor:
        gram_FF = total_FF.clone() if alone else total_FF - grams[number]
        cross_FC = total_FC if alone else total_FC - crosses[number]
        gram_FF.diagonal().add_(relative * gram_FF.diagonal().median())
        return torch.cholesky_solve(cross_FC, torch.linalg.cholesky(gram_FF))

    def lost(change_FC: Tensor) -> float:
        """Squared error on the first part, less that of no change."""
        return float((change_FC * (grams[0] @ change_FC - 2 * crosses[0])).sum())

    best = min(_RIDGES, key=lambda relative: lost(without(0, relative)))
    found = [without(number, best) for number in range(len(grams))]
    return found if lost(found[0]) < 0 else [torch.zeros_like(change) for change in found]


@dataclass
class UnitScoring:
    """Divergence of recovered models from the dense one; a ``Score`` of a search."""

    layers: Scoring
    repairs: HalfRepairs
    numbers: dict[int, int] = field(init=False)  # parameters of halves

    def __post_init__(self) -> None:
        halves = self.layers.model.architecture.halves
        self.numbers = {
            2 * layer + number: of[part].numbers
            for layer, of in halves.items()
            for number, part in enumerate(PARTS)
        }

    @property
    def model(self) -> LayerwiseModel:
        """The model."""
        return self.layers.model

    def net(self, removal: Removal) -> int:
        """Parameters less; an operator for each gap of whole layers comes back."""
        spans, _ = units_of(removal)
        added = len(spans) * self.model.hidden_size**2
        return sum(self.numbers.get(half, 0) for half in removal) - added

    def __call__(self, removals: Sequence[Removal], windows: Sequence[int]) -> list[list[float]]:
        """``Scores.sure_kl`` per removal and window; inf where it is not finite."""
        units = [units_of(removal) for removal in removals]
        cut = [Variant(spans, sublayers=halves) for spans, halves in units]
        self.layers.dense.fit([spans for spans, _ in units])
        self.repairs.fit(cut)
        found = np.empty((len(removals), len(windows)))
        source_of = np.asarray(windows) % self.layers.windows.judges.sources
        for source in sorted(set(source_of.tolist())):
            columns = np.flatnonzero(source_of == source)
            judged = self.layers.windows.judged[np.asarray(windows)[columns]]
            for first in range(0, len(cut), self.layers.at_once):
                rows = range(len(cut))[first : first + self.layers.at_once]
                variants = [self._variant(cut[row], source) for row in rows]
                scores = window_scores(
                    self.model, [Variant(), *variants], judged, batch=self.layers.batch
                )
                for row, one in zip(rows, scores[1:], strict=True):
                    found[row, columns] = one.sure_kl
        found[~np.isfinite(found)] = math.inf
        return found.tolist()

    def _variant(self, cut: Variant, source: int) -> Variant:
        [with_operators] = self.layers.dense.variants([cut.spans], source)
        outputs = self.repairs.outputs(cut, source)
        operators = with_operators.operators
        return Variant(cut.spans, operators, sublayers=cut.sublayers, outputs=outputs)
