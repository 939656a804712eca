"""What sums cost, from shapes alone: bytes held and stored, FLOPs per token.

Legend: C hidden width, F inner width of an MLP, Z regressors.
"""

from __future__ import annotations

from ghost_dist.statistics.moments import BLOCK_COLUMNS
from ghost_dist.statistics.span_sums import Regressors
from ghost_dist.statistics.sums import num_numbers

_FLOAT64_BYTES = 8


def num_regressors(regressors: Regressors, hidden_size: int, inner_size: int) -> int:
    """Z of one kind of moments."""
    widths = {"stream": hidden_size, "stream+norm": 2 * hidden_size}
    return widths.get(regressors, hidden_size + inner_size)


def moments_bytes(regressors: Regressors, hidden_size: int, inner_size: int) -> int:
    c = hidden_size
    z = num_regressors(regressors, c, inner_size)
    return (z * z + z * c + z + 2 * c) * _FLOAT64_BYTES


def stored_bytes(regressors: Regressors, hidden_size: int, inner_size: int, blocks: int) -> int:
    """The same in the store, where ranks keep so many blocks of columns."""
    nbytes = moments_bytes(regressors, hidden_size, inner_size)
    return nbytes - saved_by_strips(num_regressors(regressors, hidden_size, inner_size), blocks)


def saved_by_strips(num_rows: int, blocks: int) -> int:
    """Bytes by which a symmetric matrix is smaller in the store; 0 where ranks share columns."""
    return (num_rows**2 - num_numbers(num_rows)) * _FLOAT64_BYTES if blocks == 1 else 0


def moments_flops(num_regressors: int, num_targets: int) -> int:
    """FLOPs per token of gram and cross, about Z^2 + 2 Z C: half of the gram is not computed."""
    z, c = num_regressors, num_targets
    widths = [min(BLOCK_COLUMNS, z - first) for first in range(0, z, BLOCK_COLUMNS)]
    gram = sum(rows * sum(widths[: i + 1]) for i, rows in enumerate(widths))
    return 2 * gram + 2 * z * c
