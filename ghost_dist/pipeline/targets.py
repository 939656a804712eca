"""From what is wanted (``selection.target``, or ``remove`` in % or bytes) to how many layers go.

Whatever a target counts (seconds, bytes, parameters), every removed layer frees some of it, and
each gap takes some back for its operator. What is left must be at most so much, whichever layers
are chosen: of a search its rules see to that, for other criteria the least layers are counted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ghost_dist.checkpoint.architecture import Architecture, exported_sizes, layer_sizes
from ghost_dist.checkpoint.layer_fields import read_config
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.twin import empty_model
from ghost_dist.config import Config, OperatorConfig, SelectionConfig, parse_size, parse_target
from ghost_dist.errors import ConfigError
from ghost_dist.pipeline.candidates import candidates_of
from ghost_dist.pipeline.layer_times import request_seconds
from ghost_dist.pipeline.turns import NEW, PROMPT, cached
from ghost_dist.report.text import target_value
from ghost_dist.run_folder import RunFolder, read_record
from ghost_dist.solver.operators import OPERATORS, refits_down
from ghost_dist.spans import Span, kept_layers

_RECORD = "target"  # in RUN: seconds are measured once
_ROUNDING = 1e-12  # relative: 21.875 % of 32 layers must not need 8; below a byte


@dataclass(frozen=True)
class Aim:
    """A target in numbers, all of one unit."""

    wanted: str  # as configured
    frees: Sequence[float]  # by every layer
    gap: float  # that each gap takes back, at most, and ...
    alone: float  # ... at most if there is one only
    total: float  # of the dense model
    most: float  # that may be left

    def least(self, gaps: int) -> float:
        """What removed layers must free together, with so many gaps."""
        needed = self.total - self.most + max(gaps * self.gap, self.alone)
        return needed - _ROUNDING * self.total

    def given(self, freed: float, gaps: int) -> float:
        """What comes out, as it was wanted: times as fast, a share or bytes; of what goes for %."""
        left = self.total - freed + gaps * self.gap
        kind, removed = self.wanted.partition(" ")[0], self.total - left
        of_target = {"speedup": self.total / left, "kv": left / self.total, "bytes": left}
        return of_target.get(kind, removed / self.total if kind.endswith("%") else removed)

    def as_plain(self, spans: Sequence[Span]) -> dict[str, Any]:
        """Target and prediction for ``result.json``."""
        gone = {*range(len(self.frees))} - {*kept_layers(spans, len(self.frees))}
        predicted = self.given(math.fsum(self.frees[layer] for layer in gone), len(spans))
        return {"target": self.wanted, "predicted": predicted}


def keep_aim(run: RunFolder, aim: Aim | None) -> None:
    if aim is not None:
        run.finish(_RECORD, aim.wanted, asdict(aim))


def kept_aim(run: Path, config: Config) -> Aim | None:
    """What was kept in RUN of the target that the configuration has, if anything was."""
    record, selection = read_record(run, _RECORD), config.selection
    if not record or record["inputs"] != (selection.target or selection.remove):
        return None
    return Aim(**record["outputs"])


@dataclass(frozen=True)
class Amount:
    """How much goes."""

    layers: int | None  # None: it is said which ones
    max_spans: int | None  # None: any number
    aim: Aim | None = None


def amount_of(aim: Aim, selection: SelectionConfig) -> Amount:
    """The fewest layers that meet an aim, and the most spans that they may go in.

    Of a search every layer counts as the mean of those that may go. ConfigError says what is the
    most that can be had.
    """
    free = sorted(f for layer, f in enumerate(aim.frees) if layer not in selection.protect)
    goes = min(len(free), len(aim.frees) - 1)
    if aim.total <= aim.most:
        has = target_value(aim.wanted, aim.given(0.0, 0))
        raise ConfigError(f"{aim.wanted}: the model has {has} as it is. Ask for less than that.")
    held, gaps = 0.0, 0
    for layers in range(1, goes + 1):
        held = math.fsum(free[:layers])
        if selection.searches:
            held = layers * (math.fsum(free) / len(free))
        gaps = min(selection.max_spans or 1, layers)
        if held < aim.least(gaps):
            continue
        if not selection.searches or selection.max_spans or not aim.gap:
            return Amount(layers, selection.max_spans, aim)
        while gaps < layers and held >= aim.least(gaps + 1):
            gaps += 1
        return Amount(layers, gaps, aim)
    raise ConfigError(
        f"{aim.wanted} cannot be had: {goes} of {len(aim.frees)} layers may go, which gives "
        f"{target_value(aim.wanted, aim.given(held, gaps))} at most. Ask for less, or protect "
        "fewer layers (selection.protect)."
    )


def aim_of(
    config: Config, source: Checkpoint, architecture: Architecture, refittable: frozenset[int]
) -> Aim:
    """What the configuration wants, in numbers; a speed-up is measured now, for some seconds."""
    selection = config.selection
    wanted, part = selection.target or str(selection.remove), ""
    kind: str
    if selection.target is None:
        kind, value = parse_size(wanted)
    else:
        kind, value, part = parse_target(wanted)
    each, alone = (m * architecture.hidden_size**2 for m in _matrices(config.operator, refittable))
    if kind == "kv":
        frees = kv_numbers(source, architecture, source.config.get("max_position_embeddings"))
        return Aim(wanted, frees, 0, 0, sum(frees), value * sum(frees))
    if kind == "speedup":
        seconds, total, product_s = request_seconds(config, source, architecture, part)
        gap_s = product_s / architecture.hidden_size**2
        return Aim(wanted, seconds, gap_s * each, gap_s * alone, total, total / value)
    if kind == "fraction":
        numbers, _ = layer_sizes(source, architecture)
        total = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
        return Aim(wanted, numbers, each, alone, total, (1 - value) * total)
    total, itemsize = source.bytes_once_read, source.dtype.itemsize
    nbytes = exported_sizes(source, architecture)
    if config.operator.dtype == "float32":
        itemsize = 4
    most = value if selection.target else total - value
    return Aim(wanted, nbytes, itemsize * each, itemsize * alone, total, most)


def kv_numbers(
    source: Checkpoint, architecture: Architecture, length: int | None
) -> tuple[float, ...]:
    """Numbers that every layer keeps of a sequence of so many tokens: asked of the family's code.

    One token goes through a model without storage, into the cache that transformers makes for it. A
    sliding window keeps no more than itself; states of state-space layers do not grow, and count as
    nothing.
    """
    config = read_config(getattr(transformers, architecture.config_class), source.config)
    length = length or PROMPT + NEW
    try:
        model = empty_model(getattr(transformers, architecture.causal_lm_class), config)
        for module in model.modules():
            # Those that look at the length of the text look at numbers, which are not there.
            rope = getattr(module, "rope_type", None)
            module.rope_type = (
                dict.fromkeys(rope, "default") if isinstance(rope, dict) else "default"
            )
        cache = transformers.DynamicCache(config=config)
        one = torch.zeros(1, 1, dtype=torch.int64, device="meta")
        with torch.inference_mode():
            model.to(torch.bfloat16)(input_ids=one, past_key_values=cache, use_cache=True)
        kept = [min(length, getattr(la, "sliding_window", None) or length) for la in cache.layers]
        found = [cached(la) // torch.bfloat16.itemsize for la in cache.layers]
        if len(found) != architecture.num_layers or not any(found):
            raise ValueError(f"{sum(map(bool, found))} layers keep something")
    except Exception as error:  # whatever a family does with a cache
        raise ConfigError(
            f"selection.target=kv: what layers of {architecture.model_type} models keep could not "
            f"be found out ({error}). Give selection.remove."
        ) from error
    return tuple(float(a * b) for a, b in zip(kept, found, strict=True))


def _matrices(operator: OperatorConfig, refittable: Collection[int]) -> tuple[int, int]:
    """C x C matrices that come back at each gap, and at the only one: the layer before it decides.

    Without a layer before it, whose down_proj could be refitted, ``auto`` tries two.
    """

    def most(start: int) -> int:
        tried = candidates_of(operator, [Span(start, start + 1)], frozenset(refittable))
        acting = [one for one in tried if OPERATORS[one.operator].acts]
        return max((1 + (one.features == "stream+norm") for one in acting), default=0)

    each = most(min(refittable, default=-1) + 1)
    return each, each if refits_down(operator.name) else max(each, most(0))
