"""The operators: which sums each is fitted from, by which function, and what it changes.

An operator is a function in a file of its own, its name in ``config.OperatorName`` and a line of
:data:`OPERATORS`; candidates, fits, ``compare``, ``plan`` and the report find it here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.config import OperatorName
from ghost_dist.solver.down_proj import fit_fold, fit_ghost_joint
from ghost_dist.solver.ghost import fit_ghost, fit_norm_linear
from ghost_dist.solver.least_squares import Fit, FitOptions
from ghost_dist.statistics.moments import Moments
from ghost_dist.statistics.span_sums import Regressors


@dataclass(frozen=True, eq=False, kw_only=True)
class FitInput:
    """What a fit at a span has; tensors and sums are float64 on one device."""

    span: str
    regressors: Regressors
    folds: Sequence[Moments]  # of disjoint windows
    ridge: Any  # "auto", RelativeRidge or AbsoluteRidge
    options: FitOptions
    down_FC: Tensor | None  # the model's down_proj of layer start - 1, where regressors are joint
    norm_eps: float


Fitting = Callable[[FitInput], tuple[Repair, Fit]]


class Operator(NamedTuple):
    fit: Fitting | None  # None: nothing is fitted
    regressors: Regressors | None = "stream"  # of the sums; None then, too
    size: Callable[[int, int], int] | None = None  # of its least squares, by C and F; None: of all
    acts: bool = True  # at the gap, and not only in the layer before it

    @property
    def refits(self) -> bool:
        """Whether the down_proj of the layer before the gap is replaced."""
        return self.regressors == "joint"


def _ghost(given: FitInput) -> tuple[Repair, Fit]:
    norm_eps = given.norm_eps if given.regressors == "stream+norm" else None
    return fit_ghost(given.span, given.folds, given.ridge, norm_eps=norm_eps, **given.options)


def _norm_linear(given: FitInput) -> tuple[Repair, Fit]:
    arguments = (given.span, given.folds, given.ridge)
    return fit_norm_linear(*arguments, norm_eps=given.norm_eps, **given.options)


def _with_down(solve: Callable[..., tuple[Repair, Fit]]) -> Fitting:
    return lambda g: solve(g.span, g.folds, g.down_FC, g.ridge, **g.options)


OPERATORS: dict[OperatorName, Operator] = {
    "none": Operator(None, None, acts=False),
    "fold": Operator(_with_down(fit_fold), "joint", lambda _, f: f, acts=False),
    "norm-linear": Operator(_norm_linear, "stream+norm", lambda c, _: c),
    "ghost": Operator(_ghost),
    "ghost-joint": Operator(_with_down(fit_ghost_joint), "joint"),
}


def operator_of(name: str | None) -> Operator | None:
    """None for ``auto``, which tries several, and for other names."""
    return next((found for known, found in OPERATORS.items() if known == name), None)


def refits_down(name: str | None) -> bool:
    """Whether an operator of that name (not ``auto``) replaces a down_proj."""
    found = operator_of(name)
    return found is not None and found.refits
