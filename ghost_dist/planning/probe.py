"""Measures a machine with the things that runs do, at the model's shapes, for a few seconds.

What would take longer than ``_LONGEST_S``, reckoned from the rate of plain products, is tried
smaller, or left to that rate. B windows of a batch, T tokens, C hidden width, F inner width.
"""

import math
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ghost_dist.checkpoint.layer_fields import cut_config, read_config
from ghost_dist.checkpoint.twin import random_model, random_tensor
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.devices import device_name
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.engines.model_sizes import LayerSizes
from ghost_dist.evaluation.scores import window_scores
from ghost_dist.pipeline.cost import Cost, Fits
from ghost_dist.pipeline.run_shape import RunShape
from ghost_dist.pipeline.turns import timed
from ghost_dist.planning.rates import Rates, measure_files
from ghost_dist.solver.least_squares import fit_least_squares
from ghost_dist.spans import Span
from ghost_dist.statistics.moments import Moments
from ghost_dist.statistics.span_sums import (
    Regressors,
    SpanCollector,
    moments_bytes,
    moments_flops,
    num_regressors,
)

_LONGEST_S = 1.0
_SHARE_OF_MEMORY = 0.5
_FEWEST_TOKENS = 64
_MOST_ENTRIES = 8192  # of the vocabulary: the FLOP/s of a head are those of a part of it
_FOLDS = 3


def circumstances(run: RunShape, costs: Mapping[str, Cost], folder: Path) -> dict[str, Any]:
    inputs = run.inputs
    model = {k: v for k, v in inputs.source.config.items() if k != "_name_or_path"}
    return {
        "device": device_name(inputs.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(inputs.dtype),
        "model": model,
        "batch": inputs.batch,
        "window_length": run.window_length,
        "sums": _kinds(costs),
        "file_systems": [inputs.source.path.resolve().stat().st_dev, folder.stat().st_dev],
    }


def measure(run: RunShape, costs: Mapping[str, Cost], folder: Path) -> Rates:
    """Measure what the stages say that they do; files in ``folder``, which must be writable."""
    began = time.perf_counter()
    inputs = run.inputs
    with torch.inference_mode():
        process_s = _process(run)
        files = measure_files(inputs.source, folder, inputs.device, inputs.dtype)
        dtypes = dict.fromkeys((inputs.dtype, torch.float64))
        plain = {str(d).removeprefix("torch."): _plain(run, d) for d in dtypes}
        products = plain | _layers(run, plain[str(inputs.dtype).removeprefix("torch.")])
        sums, fits = _kinds(costs)
        factors = {kind: _factors(run, kind) for kind in fits}
        products |= {kind: _sums(run, kind, plain["float64"]) for kind in sums}
    return Rates(
        device=device_name(inputs.device),
        **files,
        products=products,
        factors=factors,
        process_s=process_s,
        measured_s=time.perf_counter() - began,
    )


def _kinds(costs: Mapping[str, Cost]) -> tuple[list[Any], list[Any]]:
    sums = {kind for cost in costs.values() for kind in cost.sums}
    return sorted(sums), sorted({fit.kind for cost in costs.values() for fit in cost.fits})


def _process(run: RunShape) -> float:
    """A fresh process as the verification of an export starts it: with the model's own code."""
    name = run.inputs.architecture.causal_lm_class.__name__
    code = f"import torch, transformers; torch.zeros(1, device={str(run.inputs.device)!r})"
    code += f"; transformers.AutoModelForCausalLM, transformers.{name}"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - began


def _plain(run: RunShape, dtype: torch.dtype) -> float:
    """FLOP/s of ``(T, C) @ (C, F)``; on a CPU at most 1024 x 2048 x 2048."""
    device, sizes = run.inputs.device, run.sizes
    most = 1 << 30 if device.type == "cuda" else 2048
    tokens, width = min(run.batch_tokens, most // 2), min(sizes.hidden_size, most)
    inner = min(sizes.widest, most)
    a = random_tensor((tokens, width), dtype, device)
    b = random_tensor((width, inner), dtype, device)
    return 2 * tokens * width * inner / timed(lambda: a @ b, device)


def _layers(run: RunShape, plain: float) -> dict[str, float]:
    """FLOP/s of a layer of each kind, and of the head with the scores; too large ones left out."""
    found: dict[str, float] = {}
    entries = min(_MOST_ENTRIES, run.sizes.vocab_size)
    head_flops = 2 * run.sizes.hidden_size * entries
    for number, layer in enumerate(run.sizes.layers):
        if layer.kind in found or layer.loaded_bytes > _SHARE_OF_MEMORY * run.free_bytes:
            continue
        batch, length = run.inputs.batch, run.window_length

        def seconds(batch: int, length: int, layer: LayerSizes = layer) -> float:
            return batch * length * (layer.flops(length) + 2 * head_flops) / plain

        while seconds(batch, length) > _LONGEST_S and batch * length >= 2 * _FEWEST_TOKENS:
            batch, length = (batch // 2, length) if batch > 1 else (1, length // 2)
        if seconds(batch, length) > _LONGEST_S:
            continue
        layer_s, head_s = _one_layer(run, number, np.zeros((batch, length), np.int32), entries)
        found[layer.kind] = batch * length * layer.flops(length) / layer_s
        found["head"] = 2 * batch * length * head_flops / head_s
    return found


def _one_layer(
    run: RunShape, number: int, tokens: np.ndarray[Any, Any], entries: int
) -> tuple[float, float]:
    """Seconds of one layer of random weights, and of the scores of two variants behind it."""
    inputs, total = run.inputs, run.num_layers
    architecture, device = inputs.architecture, inputs.device
    others = [span for span in (Span(0, number), Span(number + 1, total)) if len(span)]
    raw = cut_config(inputs.source.config, others, architecture.fields)
    config = read_config(raw)
    config.vocab_size, config.pad_token_id = entries, None
    causal_lm = random_model(architecture.causal_lm_class, config, inputs.dtype, device)
    model = LayerwiseModel(causal_lm, replace(architecture, vocab_size=entries))
    ids_BT = torch.from_numpy(tokens.astype(np.int64)).to(device)
    with model.entered():
        stream_BTC = model.embed(ids_BT)
        with model.running(0) as layer:
            layer_s = timed(lambda: layer(stream_BTC), device)
    both = [Variant(), Variant()]
    whole_s = timed(lambda: window_scores(model, both, tokens, batch=len(tokens)), device)
    return layer_s, max(1e-9, whole_s - layer_s)


def _sums(run: RunShape, kind: Regressors, plain: float) -> float:
    """FLOP/s of a collector, in smaller widths where the model's own take too long or too much."""
    inputs, tokens, width, inner = run.inputs, run.window_length, run.sizes.hidden_size, _inner(run)
    while True:
        flops = moments_flops(num_regressors(kind, width, inner), width)
        nbytes = moments_bytes(kind, width, inner)
        fits = 2 * nbytes < _SHARE_OF_MEMORY * run.free_bytes
        if fits and tokens * flops / plain < _LONGEST_S:
            break
        width, inner = width // 2, inner // 2
    span, device = Span(1, 2), inputs.device
    sample, eps = (span, kind), inputs.architecture.norm_eps
    collector = SpanCollector([sample], width, device, inner_size={0: inner}, norm_eps=eps)
    stream_TC = torch.ones(tokens, width, dtype=inputs.dtype, device=device)
    inner_TF = torch.ones(tokens, inner, dtype=inputs.dtype, device=device)

    def window() -> None:
        if kind == "joint":
            collector.take_mlp(0, 0, inner_TF, stream_TC)
        collector(1, 0, stream_TC)
        collector(2, 0, stream_TC)

    return tokens * flops / timed(window, device)


def _inner(run: RunShape) -> int:
    return max(run.inputs.architecture.inner_sizes.values(), default=0)


def _factors(run: RunShape, kind: Regressors) -> float:
    """FLOP/s of a fit with all ridges of the grid, at growing sizes until that takes too long.

    The fastest counts: a larger one is as fast or faster, unless other work slows it down.
    """
    fastest = 0.0
    width, device = run.sizes.hidden_size, run.inputs.device
    whole = num_regressors(kind, width, _inner(run))
    size = min(whole, 128)
    while True:
        targets = max(1, round(size * width / whole))
        fits = Fits.of_grid(kind, size, targets, _FOLDS)
        folds = [_random_moments(size, targets, device)] * _FOLDS
        prior_ZC = torch.zeros_like(folds[0].cross_ZC)
        seconds = timed(lambda: fit_least_squares("probe", folds, prior_ZC, "auto"), device)  # noqa: B023
        larger = min(whole, 2 * size)
        room = 12 * larger * (larger + targets) * 8 < run.free_bytes
        fastest = max(fastest, sum(fit.steps * fit.flops for fit in fits) / seconds)
        if size == whole or 8 * seconds > 3 * _LONGEST_S or not room:
            return fastest
        size = larger


def _random_moments(regressors: int, targets: int, device: torch.device) -> Moments:
    """Sums of independent rows, near enough: a unit matrix with a little noise."""
    gram_ZZ = random_tensor((regressors, regressors), torch.float64, device)
    gram_ZZ = (gram_ZZ + gram_ZZ.T) / math.sqrt(regressors)
    gram_ZZ.diagonal().add_(2.0)
    cross_ZC = gram_ZZ[:, :targets].clone()
    ones = torch.ones(regressors, dtype=torch.float64, device=device)
    return Moments(4 * regressors, gram_ZZ, cross_ZC, ones, ones[:targets], ones[:targets] * 3)
