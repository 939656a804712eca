"""The operators: which sums each is fitted from, by which function, and what it changes.

An operator is a function in a file of its own, its name in ``config.OperatorName`` and a line of
:data:`OPERATORS`; candidates, fits, ``compare``, ``plan`` and the report find it here.
"""

from collections.abc import Callable
from typing import NamedTuple

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.config import OperatorName
from ghost_dist.solver.down_proj import fit_fold, fit_ghost_joint
from ghost_dist.solver.ghost import fit_ghost, fit_norm_linear
from ghost_dist.solver.least_squares import Fit
from ghost_dist.statistics.span_sums import Regressors

Fitting = Callable[..., tuple[Repair, Fit]]
"""Of a span's name, moments of disjoint windows (float64, on one device) and a ridge; ``norm_eps``
where the regressors are stream+norm, ``down_FC`` where they are joint: the down_proj (float64) of
the layer before the gap; and what ``fit_least_squares`` may be told."""


class Operator(NamedTuple):
    fit: Fitting | None  # None: nothing is fitted
    regressors: Regressors | None = "stream"  # of the sums; None then, too
    size: Callable[[int, int], int] | None = None  # of its least squares, by C and F; None: of all
    acts: bool = True  # at the gap, and not only in the layer before it

    @property
    def refits(self) -> bool:
        """Whether the down_proj of the layer before the gap is replaced."""
        return self.regressors == "joint"


OPERATORS: dict[OperatorName, Operator] = {
    "none": Operator(None, None, acts=False),
    "fold": Operator(fit_fold, "joint", lambda _, f: f, acts=False),
    "norm-linear": Operator(fit_norm_linear, "stream+norm", lambda c, _: c),
    "ghost": Operator(fit_ghost),
    "ghost-joint": Operator(fit_ghost_joint, "joint"),
}


def operator_of(name: str | None) -> Operator | None:
    """None for ``auto``, which tries several, and for other names."""
    return next((found for known, found in OPERATORS.items() if known == name), None)


def refits_down(name: str | None) -> bool:
    """Whether an operator of that name (not ``auto``) replaces a down_proj."""
    found = operator_of(name)
    return found is not None and found.refits
