"""Half of a symmetric matrix, and the whole again."""

import pytest
import torch

from ghost_dist.statistics.sums import from_strips, mirror_, num_numbers, to_strips


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000, 5000])
def test_strips_give_back_the_matrix(size):
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix = matrix + matrix.T
    strips = to_strips(matrix)
    assert torch.equal(from_strips(strips), matrix)
    assert sum(strip.numel() for strip in strips) == num_numbers(size)


def test_large_matrices_take_little_more_than_half():
    assert 0.5 < num_numbers(18432) / 18432**2 < 0.54


def test_what_is_above_the_diagonal_strips_is_not_looked_at():
    matrix = torch.randn(600, 600, dtype=torch.float64)
    matrix = matrix + matrix.T
    torn = matrix.clone()
    torn[:256, 256:] = torch.nan
    assert torch.equal(from_strips(to_strips(torn)), matrix)


def test_strips_of_another_matrix_are_refused():
    strips = to_strips(torch.ones(600, 600))
    with pytest.raises(ValueError, match="shape"):
        from_strips([strips[1], *strips[1:]])
    with pytest.raises(ValueError, match="shape"):
        from_strips([strips[0], strips[2]])


@pytest.mark.parametrize("block_rows", [1, 7, 64])
def test_the_lower_half_is_mirrored(block_rows, monkeypatch):
    monkeypatch.setattr("ghost_dist.statistics.sums._BLOCK_ROWS", block_rows)
    matrix = torch.randn(50, 50)
    lower = matrix.clone()
    mirror_(matrix)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.tril(), lower.tril())
