"""Absolute sums, and the block Hadamard rotation against the explicit matrix."""

import pytest
import torch

from ghost_dist.statistics.span_sums import AbsoluteSums, absolute_sums, rotate


def hadamard(width):
    """The orthonormal block matrix, built from its definition by bits: (-1)^popcount(i & j)."""
    block = max(b for b in (1, 2, 4, 8, 16, 32, 64) if width % b == 0)
    matrix = torch.zeros(width, width, dtype=torch.float64)
    for i in range(width):
        for j in range(width):
            if i // block == j // block:
                sign = (-1) ** (i % block & j % block).bit_count()
                matrix[i, j] = sign / block**0.5
    return matrix


@pytest.mark.parametrize("width", [1, 2, 3, 8, 12, 20, 64])
def test_rotation_is_the_block_hadamard_matrix(width):
    rows = torch.randn(5, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(rotate(rows), rows @ hadamard(width))
    torch.testing.assert_close(rotate(rotate(rows)), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_equal_direct_ones_and_add_up(dtype):
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(30, 12, generator=generator) * 40).to(dtype)
    y = (torch.randn(30, 12, generator=generator) - 5).to(dtype)
    whole = absolute_sums(x, y)
    assert whole.num_tokens == 30
    matrix = hadamard(12)
    expected = {
        "sum_abs_x_C": x.double().abs().sum(0),
        "sum_abs_y_C": y.double().abs().sum(0),
        "sum_abs_rotated_x_C": (x.double() @ matrix).abs().sum(0),
        "sum_abs_rotated_y_C": (y.double() @ matrix).abs().sum(0),
    }
    for name, array in whole.arrays().items():
        assert array.dtype == torch.float64
        torch.testing.assert_close(array, expected[name], rtol=1e-6, atol=0)
    parts = absolute_sums(x[:11], y[:11]) + absolute_sums(x[11:], y[11:])
    back = whole - absolute_sums(x[11:], y[11:])
    for name, array in whole.arrays().items():
        torch.testing.assert_close(parts.arrays()[name], array)
        torch.testing.assert_close(
            back.arrays()[name], absolute_sums(x[:11], y[:11]).arrays()[name]
        )
    assert AbsoluteSums(30, **whole.arrays()) == whole
