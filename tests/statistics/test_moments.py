"""Moments against direct float64 products, and the invariances that everything else relies on."""

import pytest
import torch

from ghost_dist.errors import NonFiniteActivationError
from ghost_dist.spans import Span
from ghost_dist.statistics import moments as moments_module
from ghost_dist.statistics.collect import CosineCollector, SpanCollector
from ghost_dist.statistics.moments import Moments, MomentsAccumulator

C, T, WINDOWS = 24, 40, 6
CPU = torch.device("cpu")


def rows(seed=0, dtype=torch.float32):
    """Windows of X and Y with a massive channel and a shifted mean, as residual streams have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(WINDOWS, T, C, generator=generator) + 3
    x[:, :, 5] *= 1000
    y = x + torch.randn(WINDOWS, T, C, generator=generator)
    return x.to(dtype), y.to(dtype)


def accumulate(x, y):
    accumulator = MomentsAccumulator(C, CPU)
    for x_TC, y_TC in zip(x, y, strict=True):
        accumulator.add(x_TC, y_TC)
    return accumulator.result()


def direct(x, y):
    x, y = x.reshape(-1, C).double(), y.reshape(-1, C).double()
    return Moments(len(x), x.T @ x, x.T @ y, x.sum(0), y.sum(0), (y * y).sum(0))


def assert_close(a, b, rtol):
    assert a.num_tokens == b.num_tokens
    for name, array in a.arrays().items():
        scale = b.arrays()[name].abs().max()
        assert (array - b.arrays()[name]).abs().max() <= rtol * scale, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_equal_direct_products(dtype):
    x, y = rows(dtype=dtype)
    # n float64 additions of products: n * eps relative to the sum of magnitudes.
    assert_close(accumulate(x, y), direct(x, y), rtol=T * WINDOWS * 2.3e-16)


def test_cross_is_x_transposed_y():
    x = torch.zeros(1, 2, C)
    y = torch.zeros(1, 2, C)
    x[0, :, 2], y[0, :, 7] = 3, 5
    cross = accumulate(x, y).cross_CC
    assert cross[2, 7] == 30
    assert cross.count_nonzero() == 1


def test_plus_and_minus_are_shards_and_folds():
    x, y = rows()
    whole, first, rest = accumulate(x, y), accumulate(x[:2], y[:2]), accumulate(x[2:], y[2:])
    assert_close(first + rest, whole, rtol=1e-14)
    assert_close(whole - rest, first, rtol=1e-13)


def test_flushed_float32_path_keeps_the_error_bound(monkeypatch):
    monkeypatch.setattr(moments_module, "has_full_rate_float64", lambda device: False)
    monkeypatch.setattr(moments_module, "FLUSH_TOKENS", 16)
    x, y = rows(dtype=torch.bfloat16)
    got, expected = accumulate(x, y), direct(x, y)
    # Error of one entry relative to the correlation scale sqrt(G_ii G_jj): 16 float32 additions.
    scale = expected.gram_CC.diagonal().sqrt()
    error = (got.gram_CC - expected.gram_CC).abs() / torch.outer(scale, scale)
    assert 0 < error.max() < 16 * 6e-8
    assert torch.equal(got.sumsq_y_C, accumulate(x, y).sumsq_y_C)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]])
def test_collector_is_one_pass_over_several_spans(order):
    streams = torch.stack([rows(seed)[0] for seed in range(5)])  # boundary, window, T, C
    spans = [Span(0, 2), Span(1, 2), Span(2, 4)]
    collector = SpanCollector(spans, C, CPU)
    assert collector.boundaries == (0, 1, 2, 4)
    for window in order:
        for boundary in collector.boundaries:
            collector(boundary, window, streams[boundary, window])
    for span, got in collector.result().items():
        expected = direct(streams[span.start], streams[span.stop])
        assert_close(got, expected, rtol=1e-13)


def test_batches_are_bitwise_the_same_as_single_windows():
    """Boundary-major batches and window-major runs add the same rows in the same order."""
    streams = torch.stack([rows(seed)[0] for seed in range(3)])
    results = []
    for batch in (1, 2, 3, 6):
        collector = SpanCollector([Span(0, 2)], C, CPU)
        for first in range(0, WINDOWS, batch):
            for boundary in (0, 2):
                for window in range(first, first + batch):
                    collector(boundary, window, streams[boundary, window])
        results.append(collector.result()[Span(0, 2)])
    for other in results[1:]:
        for name, array in other.arrays().items():
            assert torch.equal(array, results[0].arrays()[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_stream_names_layer_and_window(value):
    x, y = rows()
    y[4, 7, 3] = value
    collector = SpanCollector([Span(2, 6)], C, CPU)
    for window in range(WINDOWS):
        collector(2, window, x[window])
        collector(6, window, y[window])
    with pytest.raises(NonFiniteActivationError, match="entering layer 6.*window 4"):
        collector.result()


def test_cosine_is_per_token_over_channels_and_scores_every_start():
    num_layers, remove = 5, 2
    generator = torch.Generator().manual_seed(1)
    streams = torch.randn(num_layers + 1, WINDOWS, T, C, generator=generator)
    collector = CosineCollector(num_layers, remove, CPU)
    assert collector.boundaries == tuple(range(num_layers + 1))
    for window in range(WINDOWS):
        for boundary in range(num_layers + 1):
            collector(boundary, window, streams[boundary, window])
    a = streams[: num_layers + 1 - remove].double()
    b = streams[remove:].double()
    expected = ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean((1, 2))
    assert len(collector.result()) == num_layers - remove + 1  # includes [3, 5), up to the last
    assert torch.allclose(
        torch.tensor(collector.result(), dtype=torch.float64), expected, atol=1e-6
    )
