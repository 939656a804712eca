"""The same code on an NVIDIA GPU: sums, a whole run in bf16, memory. ``pytest -m gpu``."""

import time

import pytest
import torch

from ghost_dist.config_file import load_config
from ghost_dist.demo import PICO
from ghost_dist.devices import watched_idle
from ghost_dist.pipeline.collectors import Stopwatch
from ghost_dist.pipeline.recover import recover
from ghost_dist.statistics import moments as moments_module
from ghost_dist.statistics.moments import MomentsAccumulator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
CUDA = torch.device("cuda")
C, T, WINDOWS = 1024, 2048, 4


def rows():
    """bf16 streams with massive channels, on the GPU."""
    generator = torch.Generator(device=CUDA).manual_seed(0)
    x = torch.randn(WINDOWS, T, C, generator=generator, device=CUDA)
    x[:, :, ::100] *= 300
    y = x + torch.randn(WINDOWS, T, C, generator=generator, device=CUDA)
    return x.bfloat16(), y.bfloat16()


def accumulate(x, y):
    accumulator = MomentsAccumulator(C, C, x.device)
    for x_TC, y_TC in zip(x, y, strict=True):
        accumulator.add((x_TC,), y_TC)
    return accumulator.result()


def correlation_error(got, expected):
    scale_x = expected.gram_ZZ.diagonal().sqrt()
    scale_y = expected.sumsq_y_C.sqrt()
    gram = (got.gram_ZZ - expected.gram_ZZ).abs() / torch.outer(scale_x, scale_x)
    cross = (got.cross_ZC - expected.cross_ZC).abs() / torch.outer(scale_x, scale_y)
    return max(gram.max().item(), cross.max().item())


def test_float64_sums_equal_those_of_the_cpu():
    x, y = rows()
    expected = accumulate(x.cpu(), y.cpu()).to(CUDA)
    assert correlation_error(accumulate(x, y), expected) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_flushed_float32_path_is_within_its_stated_error(monkeypatch, dtype):
    x, y = (stream.to(dtype) for stream in rows())
    expected = accumulate(x, y)
    monkeypatch.setattr(moments_module, "has_full_rate_float64", lambda device: False)
    # TF32 must not be used even where the user has allowed it.
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert 0 < correlation_error(accumulate(x, y), expected) < 1e-5


def test_recover_on_the_gpu_agrees_with_the_cpu(tmp_path):
    def run(device, dtype):
        text = tmp_path / "text.txt"
        text.write_text("".join(path.read_text() for path in sorted(PICO.parent.glob("*.py"))) * 40)
        return recover(
            load_config(
                None,
                {
                    "model.path": str(PICO),
                    "model.dtype": dtype,
                    "calibration.source": str(text),
                    "calibration.windows": 16,
                    "calibration.window_length": 512,
                    "selection.spans": "6:10",
                    "operator.ridge": {"relative": 0.01},
                    "engine.device": device,
                    "evaluation.corpora": {"text": str(text)},
                    "evaluation.windows": 8,
                    "evaluation.window_length": 512,
                    "output.path": str(tmp_path / f"{device}-{dtype}"),
                },
            )
        )

    cpu, gpu = run("cpu", "float32"), run("cuda", "float32")
    for variant, value in cpu["perplexity"]["text"].items():
        assert gpu["perplexity"]["text"][variant] == pytest.approx(value, rel=2e-3)
    half = run("cuda", "auto")
    for variant, value in cpu["perplexity"]["text"].items():
        assert half["perplexity"]["text"][variant] == pytest.approx(value, rel=3e-2)
    assert half["peak_bytes"]["device"] > 0
    assert "NVIDIA" in half["device"]


def test_forward_and_sums_are_timed_without_waiting():
    """Events in the stream: the host is far ahead when the device has not begun."""
    watch = Stopwatch(CUDA)
    torch.cuda.synchronize()
    host = time.perf_counter()
    began = watch.now()
    for _ in range(3):
        torch.cuda._sleep(50_000_000)
        with watch.lap():
            torch.cuda._sleep(100_000_000)
    queued = time.perf_counter() - host
    whole = watch.until_now(began)
    assert queued < whole / 3
    # Other processes may have turns on the device, so not sharper; all or none would be far off.
    assert watch.seconds() == pytest.approx(whole * 2 / 3, rel=0.3)


def test_idle_share_of_a_gpu_that_works_half_the_time():
    torch.cuda.synchronize()
    with watched_idle(CUDA) as idle:
        for _ in range(4):
            began = time.perf_counter()
            torch.cuda._sleep(200_000_000)
            torch.cuda.synchronize()
            time.sleep(time.perf_counter() - began)
        assert idle() == pytest.approx(0.5, abs=0.1)
