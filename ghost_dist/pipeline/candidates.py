"""Which fits are tried, which sums each needs, and one fit from sums that were stored.

A candidate is one way to repair all spans: operator, features, ridge. What the
configuration leaves to ``auto`` makes several of them; what it says makes one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.config import CalibrationConfig, OperatorConfig, OperatorName
from ghost_dist.errors import ConfigError
from ghost_dist.ridge import AbsoluteRidge, RelativeRidge
from ghost_dist.solver.least_squares import FEW_TOKENS_PER_REGRESSOR, Fit, more_windows
from ghost_dist.solver.operators import OPERATORS, refits_down
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import Regressors, num_regressors, sums_key

Ridge = Literal["auto"] | RelativeRidge | AbsoluteRidge

SHIFTS = (1.0, 0.0, -1.0, -2.0)
"""Decades from the ridge of least held-out residual at which the choice by KL looks: with few
tokens the logits ask for a stronger ridge than the squared error of the stream does, with many for
a weaker one (``docs/choices.md``)."""
FINE_SHIFTS = (0.5, -0.5)
"""Tried then around the best one."""
FAR_BEHIND = 1.15
"""Times the least KL on the first source, above which a candidate is not tried on the others."""
_REFIT_TOKENS = 8  # for each regressor


@dataclass(frozen=True)
class Candidate:
    """One way to repair all spans; nothing is left to ``auto`` but a ridge."""

    operator: OperatorName
    features: Literal["stream", "stream+norm"] = "stream"
    ridge: Ridge = "auto"  # that of least held-out residual, times 10^shift
    shift: float = 0.0
    around: float | None = None  # where that ridge is, relative and about, if it is known

    def kind(self) -> Regressors | None:
        """The sums that a span of it is fitted from; None: none."""
        regressors = OPERATORS[self.operator].regressors
        return self.features if regressors == "stream" else regressors

    def num_regressors(self, span: Span, architecture: Architecture) -> int:
        """Regressors of its least squares at a span; of a candidate as it is there."""
        size, kind = OPERATORS[self.operator].size, self.kind()
        if kind is None:
            return 0
        width, inner = architecture.hidden_size, architecture.inner_sizes.get(span.start - 1, 0)
        return size(width, inner) if size else num_regressors(kind, width, inner)

    def at(self, span: Span, refittable: frozenset[int]) -> Candidate:
        """What is done at a span: ghost where the down_proj before it cannot be refitted."""
        if refits_down(self.operator) and span.start - 1 not in refittable:
            return replace(self, operator="ghost")
        return self

    def with_ridge_of(self, fit: Fit | None) -> Candidate:
        """The same once a fit has found its ridge."""
        if fit is None or self.ridge != "auto":
            return self
        return replace(self, ridge=RelativeRidge(relative=fit.relative_ridge), shift=0.0)

    def described(self) -> dict[str, Any]:
        """Plain values for ``result.json``."""
        ridge: Any = self.ridge
        if isinstance(ridge, str):
            ridge = f"auto x {10**self.shift:.3g}" if self.shift else "auto"
        else:
            ridge = ridge.model_dump()
        return {
            "operator": self.operator,
            "features": self.features,
            "ridge": ridge,
        }


def candidates_of(
    config: OperatorConfig, spans: Sequence[Span], refittable: frozenset[int]
) -> list[Candidate]:
    """What the configuration asks to try, best guess first."""
    if config.name != "auto" and refits_down(config.name):
        _check_refittable(config.name, spans, refittable)
    shifts = SHIFTS if searches_ridge(config) else (0.0,)
    fitted = [
        Candidate(operator, features, config.ridge, shift)
        for operator, features in _forms(config, spans, refittable)
        for shift in shifts
    ]
    return [*fitted, Candidate("none")] if config.name == "auto" else fitted


def tries_refit(
    config: OperatorConfig,
    chosen: Candidate,
    spans: Sequence[Span],
    num_tokens: int,
    architecture: Architecture,
    refittable: frozenset[int],
) -> bool:
    """Whether fits on the recovered stream are compared with those on the dense one.

    They harm where there are few tokens for them (``docs/log.md``), so there it is not tried.
    """
    if config.refit != "auto" or config.choose != "kl" or len(spans) < 2:
        return False
    later = spans[1:]
    sizes = [chosen.at(span, refittable).num_regressors(span, architecture) for span in later]
    return min(sizes) > 0 and num_tokens >= _REFIT_TOKENS * max(sizes)


def few_tokens(
    calibration: CalibrationConfig,
    candidates: Sequence[Candidate],
    spans: Sequence[Span],
    architecture: Architecture,
    refittable: frozenset[int],
) -> str | None:
    """What to say where the calibration tokens are few for the largest least squares asked for."""
    most, name = max(
        (here.num_regressors(span, architecture), here.operator)
        for candidate in candidates
        for span in spans
        for here in [candidate.at(span, refittable)]
    )
    tokens = calibration.windows * calibration.window_length
    if tokens >= FEW_TOKENS_PER_REGRESSOR * most:
        return None
    return (
        f"{tokens:,} calibration tokens will be {tokens / most:.1f} for each of the {most:,} "
        f"regressors of {name}; with fewer than 4 the fit is uncertain. Try --set "
        f"calibration.windows={more_windows(calibration.windows, tokens / most)}"
    )


def _forms(
    config: OperatorConfig, spans: Sequence[Span], refittable: frozenset[int]
) -> list[tuple[OperatorName, Literal["stream", "stream+norm"]]]:
    """Operators that are fitted, and their regressors; one pass decides between them."""
    if config.name == "auto":
        if any(span.start - 1 in refittable for span in spans):
            return [("ghost-joint", "stream"), ("fold", "stream")]
    elif config.name != "ghost":
        return [(config.name, "stream")]
    if config.features == "auto":
        return [("ghost", "stream"), ("ghost", "stream+norm")]
    return [("ghost", config.features)]


def searches_ridge(config: OperatorConfig) -> bool:
    """Whether ridges other than that of least residual are tried."""
    fitted = config.name == "auto" or OPERATORS[config.name].regressors is not None
    return fitted and config.choose == "kl" and config.ridge == "auto"


def samples_of(
    candidates: Sequence[Candidate], spans: Sequence[Span], refittable: frozenset[int]
) -> list[tuple[Span, Regressors]]:
    """The sums that all candidates together need; the stream's follow from ``joint`` ones."""
    samples = []
    for span in spans:
        kinds = {kind for one in candidates if (kind := one.at(span, refittable).kind())}
        if "joint" in kinds:
            kinds.discard("stream")
        samples += [(span, kind) for kind in sorted(kinds)]
    return samples


def stored_kind(kind: Regressors, span: Span, entries: Mapping[str, str]) -> Regressors | None:
    """The sums in a store that these are, or that they follow from; None: neither is there."""
    if sums_key(span, kind) in entries:
        return kind
    return "joint" if kind == "stream" and sums_key(span, "joint") in entries else None


def _check_refittable(
    name: OperatorName, spans: Sequence[Span], refittable: frozenset[int]
) -> None:
    for span in spans:
        if span.start == 0:
            raise ConfigError(
                f"operator.name={name} needs a layer before span {span}, whose down_proj it can "
                "refit. Use operator.name=ghost."
            )
        if span.start - 1 not in refittable:
            raise ConfigError(
                f"operator.name={name} refits the down_proj of layer {span.start - 1}, but that "
                "layer has none whose output is added to the stream as it is (experts, or a norm "
                "or a scale behind the MLP). Use operator.name=ghost or auto."
            )


@dataclass(eq=False)
class Tried:
    """A candidate beside others, and what is known of it."""

    candidate: Candidate
    row: dict[str, Any] = field(init=False)  # of the table
    fits: dict[Span, Fit] = field(default_factory=dict)  # its first ones
    scores: Tensor = field(default_factory=lambda: torch.tensor([]))  # by source, or by span

    def __post_init__(self) -> None:
        self.row = self.candidate.described()


def least(tried: Sequence[Tried]) -> Tried:
    """That of the least finite mean score, the first of equals, among those that could be fitted.

    Where the plain cut is one of them, what is worse than it on any source is not taken.
    """
    cut = next((one.scores for one in tried if one.candidate.operator == "none"), None)

    def rank(one: Tried) -> tuple[bool, bool, bool, float]:
        mean = float(one.scores.mean()) if len(one.scores) else math.inf
        harms = cut is not None and len(one.scores) > 0 and bool((one.scores > cut).any())
        return "failed" in one.row, harms, not math.isfinite(mean), mean

    return min(tried, key=rank)


def not_far_behind(tried: Sequence[Tried], than: float) -> list[Tried]:
    """Those that are tried on the other sources too: always the plain cut, which none may harm."""
    bound = FAR_BEHIND * min(than, *(float(one.scores[0]) for one in tried))
    return [one for one in tried if one.candidate.kind() is None or float(one.scores[0]) <= bound]


def strongest_ridge(tried: Sequence[Tried], best: Tried) -> Tried:
    """The best candidate with the strongest ridge that is worse by no more than a standard error.

    On text like the calibration's, weak ridges differ little; on other text stronger ones are
    better.
    """
    for one in sorted(tried, key=lambda one: -one.candidate.shift):
        if replace(one.candidate, shift=0.0) == replace(best.candidate, shift=0.0):
            worse = one.scores - best.scores
            alike = len(worse) > 1 and float(worse.mean()) <= float(worse.std()) / len(worse) ** 0.5
            if "failed" not in one.row and alike:
                return one
    return best
