"""Moments against direct float64 products, and the invariances that everything else relies on."""

import pytest
import torch

from ghost_dist.errors import NonFiniteActivationError
from ghost_dist.spans import Span
from ghost_dist.statistics import moments as moments_module
from ghost_dist.statistics.moments import Moments, MomentsAccumulator
from ghost_dist.statistics.span_sums import SpanCollector, sums_key

C, T, WINDOWS = 24, 40, 6
CPU = torch.device("cpu")
STREAM = "stream"


def rows(seed=0, dtype=torch.float32):
    """Windows of X and Y with a massive channel and a shifted mean, as residual streams have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(WINDOWS, T, C, generator=generator) + 3
    x[:, :, 5] *= 1000
    y = x + torch.randn(WINDOWS, T, C, generator=generator)
    return x.to(dtype), y.to(dtype)


def accumulate(x, y):
    accumulator = MomentsAccumulator(C, C, CPU)
    for x_TC, y_TC in zip(x, y, strict=True):
        accumulator.add((x_TC,), y_TC)
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
    cross = accumulate(x, y).cross_ZC
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
    scale = expected.gram_ZZ.diagonal().sqrt()
    error = (got.gram_ZZ - expected.gram_ZZ).abs() / torch.outer(scale, scale)
    assert 0 < error.max() < 16 * 6e-8
    assert torch.equal(got.sumsq_y_C, accumulate(x, y).sumsq_y_C)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]])
def test_collector_is_one_pass_over_several_spans(order):
    streams = torch.stack([rows(seed)[0] for seed in range(5)])  # boundary, window, T, C
    spans = [Span(0, 2), Span(1, 2), Span(2, 4)]
    collector = SpanCollector([(span, STREAM) for span in spans], C, CPU)
    assert collector.boundaries == (0, 1, 2, 4)
    for window in order:
        for boundary in collector.boundaries:
            collector(boundary, window, streams[boundary, window])
    result = collector.result()
    assert result.keys() == {"0-2/stream", "1-2/stream", "2-4/stream"}
    for span in spans:
        got = result[sums_key(span, STREAM)]
        expected = direct(streams[span.start], streams[span.stop])
        assert_close(got, expected, rtol=1e-13)


def test_batches_are_bitwise_the_same_as_single_windows():
    """Boundary-major batches and window-major runs add the same rows in the same order."""
    streams = torch.stack([rows(seed)[0] for seed in range(3)])
    results = []
    for batch in (1, 2, 3, 6):
        collector = SpanCollector([(Span(0, 2), STREAM)], C, CPU)
        for first in range(0, WINDOWS, batch):
            for boundary in (0, 2):
                for window in range(first, first + batch):
                    collector(boundary, window, streams[boundary, window])
        results.append(collector.result()["0-2/stream"])
    for other in results[1:]:
        for name, array in other.arrays().items():
            assert torch.equal(array, results[0].arrays()[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_stream_names_layer_and_window(value):
    x, y = rows()
    y[4, 7, 3] = value
    collector = SpanCollector([(Span(2, 6), STREAM)], C, CPU)
    for window in range(WINDOWS):
        collector(2, window, x[window])
        collector(6, window, y[window])
    with pytest.raises(NonFiniteActivationError, match="entering layer 6.*window 4"):
        collector.result()


def push_with_mlp(samples, x, h, product, y, **options):
    collector = SpanCollector(samples, C, CPU, **options)
    assert collector.mlp_layers == (2,)
    for window in range(WINDOWS):
        collector.take_mlp(2, window, h[window], product[window])
        collector(3, window, x[window])
        collector(6, window, y[window])
    return collector.result()


def test_every_kind_of_sums_from_one_pass():
    """The stream, taken apart at a down_proj, and with its norm."""
    x, y = rows()
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(WINDOWS, T, 9, generator=generator)
    product = h @ torch.randn(9, C, generator=generator)
    span = Span(3, 6)
    kinds = ["stream", "joint", "stream+norm"]
    result = push_with_mlp(
        [(span, kind) for kind in kinds], x, h, product, y, inner_size={2: 9}, norm_eps=1e-5
    )
    z = torch.cat((x - product, h), -1)
    assert_close(result["3-6/joint"].to(CPU), direct_of(z, y), rtol=1e-12)
    assert_close(result["3-6/stream"], direct(x, y), rtol=1e-12)
    normed = torch.nn.functional.rms_norm(x, (C,), eps=1e-5)
    assert_close(result["3-6/stream+norm"], direct_of(torch.cat((x, normed), -1), y), rtol=1e-6)


def direct_of(z, y):
    z, y = z.reshape(-1, z.shape[-1]).double(), y.reshape(-1, C).double()
    return Moments(len(z), z.T @ z, z.T @ y, z.sum(0), y.sum(0), (y * y).sum(0))
