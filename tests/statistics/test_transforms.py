"""Moments of several regressors against direct products, and derived moments against rows."""

from unittest import mock

import pytest
import torch

from ghost_dist.statistics import moments as moments_module
from ghost_dist.statistics.moments import (
    Moments,
    MomentsAccumulator,
    norm_features,
    retarget,
    stream_moments,
)
from ghost_dist.statistics.sums import ColumnBlock

C, F, T, WINDOWS = 12, 31, 40, 5
CPU = torch.device("cpu")


def rows(seed=0, dtype=torch.float64):
    """A, H and Y of several windows, with a massive channel and shifted means."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(WINDOWS, T, C, generator=generator, dtype=torch.float64) + 1
    a[:, :, 3] *= 300
    h = torch.randn(WINDOWS, T, F, generator=generator, dtype=torch.float64).relu()
    y = a @ torch.randn(C, C, generator=generator, dtype=torch.float64) + 2
    return a.to(dtype), h.to(dtype), y.to(dtype)


def direct(z, y):
    z, y = z.reshape(-1, z.shape[-1]).double(), y.reshape(-1, y.shape[-1]).double()
    return Moments(len(z), z.T @ z, z.T @ y, z.sum(0), y.sum(0), (y * y).sum(0))


def accumulate(a, h, y, block_columns=4096, **options):
    with mock.patch.object(moments_module, "BLOCK_COLUMNS", block_columns):
        accumulator = MomentsAccumulator(a.shape[-1] + h.shape[-1], y.shape[-1], CPU, **options)
    for i in range(len(a)):
        accumulator.add((a[i], h[i]), y[i])
    return accumulator.result()


def assert_close(got, expected, rtol=1e-12):
    assert got.num_tokens == expected.num_tokens
    assert got.arrays().keys() == expected.arrays().keys()
    for name, array in got.arrays().items():
        other = expected.arrays()[name]
        assert array.shape == other.shape, name
        assert array.dtype == torch.float64, name
        assert (array - other).abs().max() <= rtol * other.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_columns", [1, 7, 43, 4096])
def test_sums_equal_direct_products_whatever_the_blocks(dtype, block_columns):
    a, h, y = rows(dtype=dtype)
    got = accumulate(a, h, y, block_columns=block_columns)
    assert_close(got, direct(torch.cat((a, h), -1), y))


@pytest.mark.parametrize("count", [2, 3])
def test_column_blocks_join_to_the_whole(count):
    a, h, y = rows()
    blocks = [
        accumulate(a, h, y, block_columns=9, block=ColumnBlock(index, count))
        for index in range(count)
    ]
    whole = accumulate(a, h, y)
    assert_close(Moments.join(whole.num_tokens, [b.arrays() for b in blocks]), whole, rtol=1e-14)
    widths = [block.gram_ZZ.shape[1] for block in blocks]
    assert sum(widths) == whole.gram_ZZ.shape[1]
    assert max(widths) - min(widths) <= 1
    assert sum(block.cross_ZC.shape[1] for block in blocks) == whole.cross_ZC.shape[1]


def test_float32_products_flushed_into_float64(monkeypatch):
    monkeypatch.setattr(moments_module, "has_full_rate_float64", lambda device: False)
    monkeypatch.setattr(moments_module, "FLUSH_TOKENS", 16)
    a, h, y = rows(dtype=torch.bfloat16)
    got = accumulate(a, h, y)
    expected = direct(torch.cat((a, h), -1), y)
    # 16 float32 additions of exact products, against the correlation scale of each entry.
    diagonal = expected.gram_ZZ.diagonal().sqrt()
    error = (got.gram_ZZ - expected.gram_ZZ).abs() / torch.outer(diagonal, diagonal)
    assert 0 < error.max() <= 16 * 2**-24


def test_windows_in_any_order_and_chunking():
    a, h, y = rows()
    order = [3, 0, 4, 1, 2]
    assert_close(accumulate(a[order], h[order], y[order]), accumulate(a, h, y), rtol=1e-14)
    halves = accumulate(a[:2], h[:2], y[:2]) + accumulate(a[2:], h[2:], y[2:])
    assert_close(halves, accumulate(a, h, y), rtol=1e-14)
    assert_close(accumulate(a, h, y) - accumulate(a[:2], h[:2], y[:2]),
                 accumulate(a[2:], h[2:], y[2:]), rtol=1e-10)  # fmt: skip


def test_arrays_round_trip():
    moments = accumulate(*rows())
    back = Moments(moments.num_tokens, **moments.arrays())
    assert back == moments


def test_stream_moments_equal_accumulating_the_stream():
    a, h, y = rows()
    generator = torch.Generator().manual_seed(2)
    down = torch.randn(F, C, generator=generator, dtype=torch.float64)
    accumulator = MomentsAccumulator(C, C, CPU)
    for i in range(WINDOWS):
        accumulator.add((a[i] + h[i] @ down,), y[i])
    assert_close(stream_moments(accumulate(a, h, y), down), accumulator.result(), rtol=1e-11)


def test_derived_moments_equal_direct_ones():
    a, h, y = rows()
    z = torch.cat((a, h), -1)
    generator = torch.Generator().manual_seed(3)
    change = torch.randn(C + F, C, generator=generator, dtype=torch.float64)
    moments = accumulate(a, h, y)
    assert_close(retarget(moments, change), direct(z, y - z @ change), rtol=1e-11)


def test_norm_features_are_llamas_rmsnorm():
    x = torch.randn(T, C, generator=torch.Generator().manual_seed(4)) * 50
    same, normed = norm_features(x, 1e-5)
    assert same is x
    expected = torch.nn.functional.rms_norm(x, (C,), eps=1e-5)
    torch.testing.assert_close(normed, expected, rtol=1e-6, atol=1e-6)
    assert norm_features(x.bfloat16(), 1e-5)[1].dtype == torch.bfloat16
