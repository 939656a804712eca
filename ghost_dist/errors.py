"""Exceptions of ghost_dist.

User mistakes are :class:`ConfigError` (a ``ValueError``); everything else that a user can meet has
a class of its own below :class:`GhostDistError`, so that callers can tell a damaged checkpoint from
a damaged store. Every message says what, where, what was found against what was expected, and what
to do. Exceptions that cross process borders take one message, or define ``__reduce__``.
"""

from typing import Any


class GhostDistError(Exception):
    """Base of every error that ghost_dist raises on purpose."""


class ConfigError(GhostDistError, ValueError):
    """The configuration, an argument or a combination of them cannot be carried out."""


class CheckpointError(GhostDistError):
    """The model checkpoint is missing, incomplete, damaged or unsafe to read."""


class UnsupportedArchitectureError(CheckpointError):
    """The model family cannot be handled; raised before any work is done."""


class CalibrationError(GhostDistError):
    """Calibration or evaluation text cannot give the windows that were asked for."""


class RunFolderError(GhostDistError):
    """The RUN folder cannot be used: not empty, not writable, in use, or not a RUN folder."""


class RunMismatchError(RunFolderError):
    """The RUN folder belongs to another configuration; the message names the field that differs."""


class CorruptStoreError(GhostDistError):
    """Committed statistics are missing or do not match their manifest.

    ``range_ids``: the damaged window ranges; re-running exactly these repairs the store.
    """

    def __init__(self, message: str, range_ids: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.range_ids = range_ids


class NonFiniteActivationError(GhostDistError):
    """A hidden state holds NaN or Inf, so no statistic of it would mean anything.

    It is what enters layer ``boundary``, in the first calibration ``window`` concerned.
    """

    def __init__(self, boundary: int, window: int) -> None:
        super().__init__(
            f"The hidden state entering layer {boundary} is not finite (NaN or Inf) in window "
            f"{window}. The weights may be damaged, or the dtype may overflow: try "
            "model.dtype=float32 or bfloat16."
        )
        self.boundary, self.window = boundary, window

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.boundary, self.window))


class SingularGramError(GhostDistError):
    """The regularised Gram matrix of a span has no Cholesky factor in float64."""

    def __init__(self, span: str, ridge: float, condition: float, num_tokens: int) -> None:
        super().__init__(
            f"The Gram matrix of span {span} is singular in float64: ridge {ridge:.3g}, condition "
            f"number about {condition:.3g}, {num_tokens} tokens. Give more calibration tokens "
            "(calibration.windows), or let the ridge be chosen (operator.ridge=auto)."
        )
        self.span, self.ridge, self.condition, self.num_tokens = span, ridge, condition, num_tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.span, self.ridge, self.condition, self.num_tokens))


class ClusterError(GhostDistError):
    """Replicas of a cluster are lost faster than they get anything done, or cannot be placed."""


class ReductionError(GhostDistError):
    """Live sums of a reduction are not each range once: a mistake of ours, not the user's."""


class ExportError(GhostDistError):
    """The recovered checkpoint could not be written, or does not reproduce the recovered model."""


TO_CHANGE = (ConfigError, CheckpointError, CalibrationError, RunFolderError)  # exit status 2
