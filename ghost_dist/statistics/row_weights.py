"""How rows (tokens) are weighted in the least squares: sinks and massive activations else rule it.

A weight is a factor w on a whole row: ``w x`` is fitted to ``w y``, so the squared error of the row
counts ``w^2`` times. Treatments look at one window only, never at other windows or at running
values: the sums are the same whatever the order of windows and however many go through the model
together. ``num_tokens`` of weighted moments counts every row, rows of weight 0 included.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from ghost_dist.config import RowWeights
from ghost_dist.errors import ConfigError

CLIP_MULTIPLE = 2.0
"""`clip` bounds the norm of a row to this multiple of its window's median norm."""


def row_weights(treatment: RowWeights, y_TC: Tensor) -> Tensor | None:
    """Factors (T,) float64 of the rows of one window, whole and position 0 first; None: all alike.

    - ``drop-first``: the first position of the window has weight 0. In models without a BOS token
      it is the sink that attention parks on, with a norm of its own.
    - ``inverse-norm``: ``sqrt(C) / ||y||``, so that every row of ``w y`` has RMS 1, as the RMSNorm
      that reads y makes it. The residual is then the mean relative error per token. A row of zeros
      has weight 0.
    - ``clip``: ``min(1, CLIP_MULTIPLE m / ||y||)`` with m the median norm of the window's rows, the
      lower of the two middle ones. Rows below the bound keep their weight.
    """
    if treatment == "none":
        return None
    if treatment == "drop-first":
        weights_T = torch.ones(y_TC.shape[0], dtype=torch.float64, device=y_TC.device)
        weights_T[0] = 0
        return weights_T
    norm_T = torch.linalg.vector_norm(y_TC, dim=1, dtype=torch.float64)
    inverse_T = torch.where(norm_T > 0, 1 / norm_T, 0.0)
    if treatment == "inverse-norm":
        return inverse_T * math.sqrt(y_TC.shape[1])
    if treatment == "clip":
        bound = CLIP_MULTIPLE * norm_T.median()
        return torch.where(norm_T > bound, bound * inverse_T, 1.0)
    raise ConfigError(
        f"operator.row_weights={treatment!r} is unknown; give one of "
        f"{', '.join(get_args(RowWeights))}."
    )
