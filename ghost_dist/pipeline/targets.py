"""From what is wanted (``selection.target``, or ``remove`` in % or bytes) to how many layers go.

Whatever a target counts (seconds, bytes, parameters), every removed layer frees some of it, and
each gap takes some back for its operator. What is left must be at most so much, whichever layers
are chosen: of a search its rules see to that, for other criteria the least layers are counted.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from ghost_dist.amounts import parse_size, parse_target
from ghost_dist.checkpoint.architecture import Architecture, exported_sizes, layer_sizes
from ghost_dist.checkpoint.layer_fields import read_config
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.twin import empty_model
from ghost_dist.config import Config, OperatorConfig, SelectionConfig
from ghost_dist.errors import ConfigError, UnsupportedArchitectureError
from ghost_dist.pipeline.candidates import candidates_of
from ghost_dist.pipeline.layer_times import Seconds
from ghost_dist.pipeline.refittable import refittable_layers
from ghost_dist.pipeline.turns import NEW, PROMPT, cached
from ghost_dist.report.text import target_value
from ghost_dist.run_folder import RunFolder, read_record
from ghost_dist.solver.operators import OPERATORS, refits_down
from ghost_dist.solver.removals import Rules
from ghost_dist.spans import Span, kept_layers

if TYPE_CHECKING:
    from ghost_dist.pipeline.inputs import RunInputs

_RECORD = "layer-times"  # in RUN
_ROUNDING = 1e-12  # relative: 21.875 % of 32 layers must not need 8; below a byte


Times = Mapping[str, Seconds]
"""As ``request_seconds`` gives them."""


@dataclass(frozen=True)
class Aim:
    """A target in numbers, all of one unit."""

    wanted: str  # as configured
    frees: Sequence[float]  # by every layer
    gap: float  # that each gap takes back, at most, and ...
    alone: float  # ... at most if there is one only
    total: float  # of the dense model
    most: float = math.inf  # that may be left

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

    def predicted(self, spans: Sequence[Span]) -> float:
        """What comes out without these layers."""
        gone = {*range(len(self.frees))} - {*kept_layers(spans, len(self.frees))}
        return self.given(math.fsum(self.frees[layer] for layer in gone), len(spans))


def keep_times(run: RunFolder, times: Times | None) -> None:
    """Have them in RUN, so that a run that goes on reckons with the same."""
    if times is not None:
        run.finish(_RECORD, "", {part: asdict(seconds) for part, seconds in times.items()})


def kept_times(run: Path) -> Times | None:
    kept = read_record(run, _RECORD).get("outputs")
    return {part: Seconds(**seconds) for part, seconds in kept.items()} if kept else None


def _times_of_plan(path: str, num_layers: int) -> Times:
    """What ``plan --json`` of another machine says of each layer."""
    file = Path(path).expanduser()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["layer_times"]
        times = {part: Seconds(**found[part]) for part in ("", "prefill", "decode")}
        layers = {len(seconds.layers) for seconds in times.values()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"selection.layer_times: {file} is not what ghost-dist plan MODEL --target-speedup 1.3 "
            f"--json prints ({type(error).__name__}: {error})."
        ) from None
    if layers != {num_layers}:
        raise ConfigError(
            f"selection.layer_times: {file} is of a model of {max(layers)} layers, this one has "
            f"{num_layers}."
        )
    return times


@dataclass(frozen=True)
class Amount:
    """How much goes."""

    layers: int | None  # None: it is said which ones
    selection: SelectionConfig  # with no more spans than there is room for their operators
    aim: Aim | None = None
    others: tuple[Amount, ...] = ()  # to search for as well, of ``pareto``
    times: Times | None = None  # where a target or ``pareto`` asks for them

    @property
    def described(self) -> str | None:
        """How much goes for an aim; None: there is none."""
        if self.aim is None:
            return None
        most = self.selection.max_spans
        spans = "" if most is None else f", in {most} span{'s' if most > 1 else ''} at most"
        return f"{self.aim.wanted}: {self.layers} layers go{spans}"


def amount_of(aim: Aim, selection: SelectionConfig) -> Amount:
    """The fewest layers that meet an aim, and the most spans that they may go in.

    Of a search every layer counts as the mean of those that may go. ConfigError says what is the
    most that can be had, or which bounds do not allow it.
    """
    free = sorted(f for layer, f in enumerate(aim.frees) if layer not in selection.protect)
    goes = min(len(free), len(aim.frees) - 1)
    if aim.total <= aim.most:
        has = target_value(aim.wanted, aim.given(0.0, 0))
        raise ConfigError(f"{aim.wanted}: the model has {has} as it is. Ask for less than that.")
    held, gaps, fewest = 0.0, 0, 0
    for layers in range(1, goes + 1):
        held = math.fsum(free[:layers])
        if selection.searches:
            held = layers * (math.fsum(free) / len(free))
        gaps = min(selection.max_spans or 1, layers)
        if held < aim.least(gaps):
            continue
        most = selection.max_spans
        if selection.searches and not most and aim.gap:
            while gaps < layers and held >= aim.least(gaps + 1):
                gaps += 1
            most = gaps
        found = Amount(layers, selection.model_copy(update={"max_spans": most}), aim)
        with contextlib.suppress(ConfigError):
            rules_of(found, len(aim.frees))
            return found
        fewest = fewest or layers
    if fewest:
        values = selection.model_dump(mode="json")  # as they may be given
        bounds = ", ".join(
            f"selection.{name}={values[name]}" for name in _in_the_way(aim, selection)
        )
        raise ConfigError(
            f"{aim.wanted} takes {fewest} layers at least, and no such removal keeps to {bounds}. "
            "Change that, or ask for less."
        )
    raise ConfigError(
        f"{aim.wanted} cannot be had: {goes} of {len(aim.frees)} layers may go, which gives "
        f"{target_value(aim.wanted, aim.given(held, gaps))} at most. Ask for less, or protect "
        "fewer layers (selection.protect)."
    )


def rules_of(amount: Amount, num_layers: int) -> Rules:
    """What may be removed; ConfigError if that is nothing."""
    selection, remove, aim = amount.selection, amount.layers, amount.aim
    assert remove is not None
    most = selection.most_spans
    least = aim.least(min(most or remove, remove)) if aim else 0.0
    return Rules(num_layers, remove, selection.protect, most, aim.frees if aim else (), least)


def _in_the_way(aim: Aim, selection: SelectionConfig) -> list[str]:
    """Bounds without each of which it could be; all that are set, if only together they are."""
    names = ("protect", "max_spans")
    default = {name: SelectionConfig.model_fields[name].default for name in names}
    bounds = [name for name in names if getattr(selection, name) != default[name]]
    alone = []
    for name in bounds:
        with contextlib.suppress(ConfigError):
            amount_of(aim, selection.model_copy(update={name: default[name]}))
            alone.append(name)
    return alone or bounds


def open_amount(
    config: Config,
    source: Checkpoint,
    architecture: Architecture,
    times: Times | None,
    measure: Callable[[Config, Checkpoint, Architecture], Times],
) -> Amount:
    """Of the configuration and of its ``pareto``; ``times`` that are known are not measured."""
    asked, last = (config.selection, *config.selection.points), architecture.num_layers - 1
    if unknown := [layer for layer in config.selection.protect if layer > last]:
        raise ConfigError(
            f"selection.protect names layers {unknown}, but the model has layers 0 to {last}."
        )
    if times is None and (path := config.selection.layer_times) is not None:
        times = _times_of_plan(path, architecture.num_layers)
    times = _times(config, asked, times, partial(measure, config, source, architecture))

    @cache
    def refittable() -> frozenset[int]:
        try:
            return refittable_layers(config, source, architecture, reads=False)
        except UnsupportedArchitectureError:
            return frozenset()  # the larger operators

    def amount(selection: SelectionConfig) -> Amount:
        if isinstance(selection.remove, int):
            field = "remove" if selection is config.selection else "pareto"
            given = selection.remove, architecture.num_layers, selection.protect
            check_remove(*given, f"selection.{field}")
            return Amount(selection.remove, selection)
        of = config.model_copy(update={"selection": selection})
        return amount_of(aim_of(of, source, architecture, refittable(), times), selection)

    first, *others = map(amount, asked)
    return replace(first, others=tuple(others), times=times)


def _times(
    config: Config,
    asked: Sequence[SelectionConfig],
    known: Times | None,
    measure: Callable[[], Times],
) -> Times | None:
    """Where a target needs them; for ``pareto`` if they can be had."""
    targets = [parse_target(selection.target) for selection in asked if selection.target]
    parts = {part for kind, _, part in targets if kind == "speedup"}
    if not parts and not config.selection.pareto:
        return None
    if known is not None and all(min(known[part].layers) > 0 for part in parts):
        return known
    try:
        times = measure()
        if any(min(times[part].layers) <= 0 for part in parts or [""]):
            raise ConfigError(
                "selection.target=speedup: a model with fewer layers was no faster, so other "
                "programs must be busy on this device. Try again when they are not."
            )
    except ConfigError:
        if parts:
            raise
        return None
    return times


def check_remove(
    remove: int, num_layers: int, protect: Collection[int], field: str = "selection.remove"
) -> None:
    """Refuse to remove more layers than can go; ``field`` says so many."""
    most = num_layers - max(1, len(set(protect)))
    if not 0 < remove <= most:
        raise ConfigError(
            f"{field}={remove}, but the model has {num_layers} layers, "
            f"{len(set(protect))} of them protected, and at least one must be kept: give 1 to "
            f"{most}."
        )


def aim_of(
    config: Config,
    source: Checkpoint,
    architecture: Architecture,
    refittable: frozenset[int],
    times: Times | None,
) -> Aim:
    """What the configuration wants, in numbers."""
    target, wanted = config.selection.target, config.selection.wanted
    kind, value, part = parse_target(target) if target else (*parse_size(wanted), "")
    aim = counted(kind, config, source, architecture, refittable, times[part] if times else None)
    # Shares of KV and bytes of a checkpoint are what is left; a share or bytes of remove what goes.
    left = {"kv": value * aim.total, "speedup": aim.total / value, "bytes": value}
    most = left[kind] if target else aim.total - value * (aim.total if kind == "fraction" else 1)
    return replace(aim, wanted=wanted, most=most)


def counted(
    kind: str,
    config: Config,
    source: Checkpoint,
    architecture: Architecture,
    refittable: frozenset[int],
    seconds: Seconds | None,
) -> Aim:
    """What every layer and gap holds of numbers (``fraction``), ``bytes``, ``kv`` or ``speedup``,
    which needs the ``seconds`` of a request.
    """
    each, alone = (m * architecture.hidden_size**2 for m in _matrices(config.operator, refittable))
    if kind == "kv":
        frees = kv_numbers(source, architecture, source.config.get("max_position_embeddings"))
        return Aim(kind, frees, 0, 0, sum(frees))
    if kind == "speedup":
        assert seconds is not None
        gap_s = seconds.product / architecture.hidden_size**2
        return Aim(kind, seconds.layers, gap_s * each, gap_s * alone, seconds.total)
    if kind == "fraction":
        numbers, _ = layer_sizes(source, architecture)
        return Aim("%", numbers, each, alone, source.num_parameters)
    nbytes, itemsize = exported_sizes(source, architecture), source.dtype.itemsize
    if config.operator.dtype == "float32":
        itemsize = 4
    return Aim(kind, nbytes, itemsize * each, itemsize * alone, source.bytes_once_read)


def comes_to(inputs: RunInputs, spans: Sequence[Span]) -> dict[str, float | None]:
    """What is predicted without these layers: the share of the parameters that are ``removed``,
    ``bytes`` and share of the cache that are left, ``speedup``; None: not known.
    """
    given = (inputs.config, inputs.source, inputs.architecture, inputs.refittable)
    seconds = (inputs.amount.times or {}).get("")
    if seconds is not None and min(seconds.layers) <= 0:
        seconds = None  # of another part it is known

    def of(kind: str) -> float | None:
        if kind == "speedup" and seconds is None:
            return None
        try:
            return counted(kind, *given, seconds).predicted(spans)
        except ConfigError:  # not of every family it is known what its cache keeps
            return None

    kinds = {"removed": "fraction", "bytes": "bytes", "kv": "kv", "speedup": "speedup"}
    return {name: of(kind) for name, kind in kinds.items()}


def kv_numbers(
    source: Checkpoint, architecture: Architecture, length: int | None
) -> tuple[float, ...]:
    """Numbers that every layer keeps of a sequence of so many tokens: asked of the family's code.

    One token goes through a model without storage, into the cache that transformers makes for it. A
    sliding window keeps no more than itself; states of state-space layers do not grow, and count as
    nothing.
    """
    config = read_config(source.config)
    length = length or PROMPT + NEW
    try:
        model = empty_model(architecture.causal_lm_class, config)
        for module in model.modules():
            # Those that look at the length of the text look at numbers, which are not there.
            rope = getattr(module, "rope_type", None)
            module.rope_type = (
                dict.fromkeys(rope, "default") if isinstance(rope, dict) else "default"
            )
        model.set_attn_implementation("eager")  # sdpa may ask a mask whether it hides anything
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
