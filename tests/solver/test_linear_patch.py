"""LinearPatch against arithmetic by hand and the explicit matrix."""

import pytest
import torch

from ghost_dist.checkpoint.repair import apply_repair
from ghost_dist.errors import ConfigError
from ghost_dist.solver.linear_patch import fit_linear_patch
from ghost_dist.statistics.span_sums import absolute_sums


def test_diagonal_by_hand():
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    y = torch.tensor([[-2.0, 3.0], [4.0, 0.0]])
    # Channel 0: (2 + 4) / (1 + 3); channel 1: (3 + 0) / (2 + 4).
    repair = fit_linear_patch("[1, 2)", absolute_sums(x, y))
    assert repair.weight_CC.tolist() == [[1.5, 0], [0, 0.5]]
    assert apply_repair(repair, x).tolist() == [[1.5, -1.0], [4.5, 2.0]]


def test_hadamard_by_hand():
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    y = torch.tensor([[-2.0, 3.0], [4.0, 0.0]])
    # Times sqrt(2): x H = [-1, 3], [7, -1]; y H = [1, -5], [4, 4]. d = [5 / 8, 9 / 4].
    repair = fit_linear_patch("[1, 2)", absolute_sums(x, y), hadamard=True)
    h = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    expected = h @ torch.diag(torch.tensor([5 / 8, 9 / 4], dtype=torch.float64)) @ h
    torch.testing.assert_close(repair.weight_CC, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("width", [8, 12, 15])
def test_a_planted_patch_is_found(rows, width):
    """Y = X H diag(d) H exactly, for positive d, gives that matrix back for any width."""
    x = rows.normal(50, width, seed=0)
    d = rows.normal(width, seed=1).exp()
    block = width & -width
    h = torch.tensor([[1.0]], dtype=torch.float64)
    while len(h) < block:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1))) / 2**0.5
    h = torch.block_diag(*[h] * (width // block))
    w = h @ torch.diag(d) @ h
    repair = fit_linear_patch("[1, 2)", absolute_sums(x, x @ w), hadamard=True)
    # The rotated sums are taken in float32.
    torch.testing.assert_close(repair.weight_CC, w, rtol=1e-5, atol=1e-5)


def test_batches_do_not_matter(rows):
    x, y = rows.normal(40, 6, seed=2), rows.normal(40, 6, seed=3)
    whole = fit_linear_patch("[1, 2)", absolute_sums(x, y))
    parts = fit_linear_patch("[1, 2)", absolute_sums(x[:7], y[:7]) + absolute_sums(x[7:], y[7:]))
    torch.testing.assert_close(parts.weight_CC, whole.weight_CC)


def test_a_dead_channel_is_named(rows):
    x = rows.normal(10, 4, seed=4)
    x[:, 1] = 0
    with pytest.raises(ConfigError, match=r"span \[1, 2\): 1 of 4 channels"):
        fit_linear_patch("[1, 2)", absolute_sums(x, x + 1))
