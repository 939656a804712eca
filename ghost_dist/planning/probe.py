"""Measures a machine with the things that runs do, at the model's shapes, for a few seconds.

What would take too long at full size is tried smaller, or left to the FLOP rate of plain products:
nothing is tried whose cost, reckoned from the rates found before, is above ``_LONGEST_S``.

Legend: B windows of a batch, T tokens, C hidden width, F inner width of an MLP, V vocabulary.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ghost_dist.checkpoint.architecture import Architecture, cut_config
from ghost_dist.checkpoint.layer_fields import read_config
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.devices import device_name, free_bytes, synchronize
from ghost_dist.engines.shapes_only import shapes_only
from ghost_dist.planning.model_sizes import ModelSizes
from ghost_dist.planning.probe_files import measure_files
from ghost_dist.planning.rates import Curve, Rates
from ghost_dist.ridge import RelativeRidge
from ghost_dist.solver.down_proj import fit_ghost_joint
from ghost_dist.solver.ghost import fit_ghost
from ghost_dist.solver.least_squares import cholesky_factor, map_error, num_steps, step_flops
from ghost_dist.spans import Span
from ghost_dist.statistics.moments import (
    FLUSH_TOKENS,
    Moments,
    add_product,
    has_full_rate_float64,
)
from ghost_dist.statistics.pair_sums import FLUSH_TOKENS as PAIR_FLUSH_TOKENS
from ghost_dist.statistics.pair_sums import PairCollector, has_float64_pairs
from ghost_dist.statistics.span_sums import Regressors, SampleKind, SpanCollector
from ghost_dist.statistics.sum_costs import moments_bytes, moments_flops, num_regressors, pair_flops

_LONGEST_S = 1.0
_REPEATED_S = 0.2
_SHARE_OF_MEMORY = 0.5
_FEWEST_TOKENS = 64
_FIT_FOLDS = 3
_FILL = (1 << 20) - 3  # a length that no matrix's rows divide: rows stay different


@dataclass(frozen=True)
class ProbeSpec:
    """What is going to be run."""

    checkpoint: Checkpoint
    architecture: Architecture
    sizes: ModelSizes
    device: torch.device
    dtype: torch.dtype
    batch: int
    window_length: int
    inner_sizes: Mapping[Regressors, int]  # kinds of sums, with F (0 where there is none)
    columns: int | None  # of the projection; None the whole cross; 0 no selection
    folder: Path

    def key(self) -> dict[str, Any]:
        """What the rates depend on."""
        return {
            "device": device_name(self.device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": str(self.dtype),
            "model": {k: v for k, v in self.checkpoint.config.items() if k != "_name_or_path"},
            "batch": self.batch,
            "window_length": self.window_length,
            "sums": dict(sorted(self.inner_sizes.items())),
            "columns": self.columns,
            "file_systems": [
                self.checkpoint.path.resolve().stat().st_dev,
                self.folder.stat().st_dev,
            ],
        }


def measure(spec: ProbeSpec) -> Rates:
    """Measure everything; see :class:`Rates`."""
    began = time.perf_counter()
    with torch.inference_mode():
        device = device_name(spec.device)
        process_s = _process(spec)
        files = measure_files(spec.checkpoint, spec.folder, spec.device, spec.dtype)
        matmul = {
            str(dtype).removeprefix("torch."): _matmul(spec, dtype)
            for dtype in dict.fromkeys((spec.dtype, torch.float32, torch.float64))
        }
        compute = matmul[str(spec.dtype).removeprefix("torch.")]
        layer_s, forward_s = _layers(spec, compute)
        head_s, loss_s, divergence_s = _head(spec, compute)
        products, sums_s = _sums(spec)
        fit, step = _fits(spec, matmul["float64"])
    return Rates(
        device=device,
        **vars(files),
        to_device=_to_device(spec.device),
        matmul=matmul,
        layer_s=layer_s,
        forward_s=forward_s,
        head_s=head_s,
        loss_s=loss_s,
        divergence_s=divergence_s,
        products=products,
        sums_s=sums_s,
        fit=fit,
        step=step,
        fit_steps=num_steps(1, _FIT_FOLDS),
        process_s=process_s,
        measured_s=time.perf_counter() - began,
    )


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of some work, warm; work that takes long is done twice in all."""
    spent: list[float] = []
    total = 0.0
    while len(spent) < 2 or (total < _REPEATED_S and len(spent) < 50):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        spent.append(time.perf_counter() - began)
        total += spent[-1]
    warm = sorted(spent[1:])
    return max(1e-9, warm[len(warm) // 2])


def _process(spec: ProbeSpec) -> float:
    """A fresh process as the verification of an export starts it: with the model's own code."""
    code = f"import torch, transformers; torch.zeros(1, device={str(spec.device)!r})"
    code += f"; transformers.AutoModelForCausalLM, transformers.{spec.architecture.causal_lm_class}"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - began


def _to_device(device: torch.device) -> float:
    """Bytes/s to the device from pinned memory; to a CPU, within its memory."""
    block = torch.ones(64 << 20, dtype=torch.uint8)
    source = block.pin_memory() if device.type == "cuda" else block
    there = torch.empty_like(block, device=device)
    return block.nbytes / timed(lambda: there.copy_(source, non_blocking=True), device)


def _matmul(spec: ProbeSpec, dtype: torch.dtype) -> float:
    """FLOP/s of ``(T, C) @ (C, F)``; on a CPU at most 1024 x 2048 x 2048."""
    most = 1 << 30 if spec.device.type == "cuda" else 2048
    tokens = min(spec.batch * spec.window_length, most // 2)
    width = min(spec.sizes.hidden_size, most)
    inner = min(max(layer.widest for layer in spec.sizes.layers), most)
    a = torch.empty(tokens, width, dtype=dtype, device=spec.device)
    b = torch.empty(width, inner, dtype=dtype, device=spec.device)
    _fill(a)
    _fill(b)
    return 2 * tokens * width * inner / timed(lambda: a @ b, spec.device)


def _layers(spec: ProbeSpec, compute: float) -> tuple[dict[str, float], float]:
    """Seconds per token of a layer of each kind, and of a forward beside its layers."""
    found: dict[str, float] = {}
    beside = 0.0
    for number, layer in enumerate(spec.sizes.layers):
        tokens = spec.batch * spec.window_length
        length, batch = spec.window_length, spec.batch
        while layer.flops(length) * tokens / compute > _LONGEST_S and tokens >= 2 * _FEWEST_TOKENS:
            batch, length = (batch // 2, length) if batch > 1 else (1, length // 2)
            tokens = batch * length
        affordable = layer.flops(length) * tokens / compute <= _LONGEST_S
        fits = layer.loaded_bytes < _SHARE_OF_MEMORY * free_bytes(spec.device)
        if layer.kind in found or not (affordable and fits):
            continue
        seconds, beside = _one_layer(spec, number, batch, length)
        # Of a shorter window the attention is less than it will be.
        scale = layer.flops(spec.window_length) / layer.flops(length)
        found[layer.kind] = seconds * scale / tokens
    return found, beside


def _one_layer(spec: ProbeSpec, number: int, batch: int, length: int) -> tuple[float, float]:
    """Seconds of one layer of random weights, and of the forward around it."""
    architecture, total = spec.architecture, spec.architecture.num_layers
    others = [Span(0, number)] if number else []
    others += [Span(number + 1, total)] if number + 1 < total else []
    raw = cut_config(spec.checkpoint.config, others, architecture)
    config = read_config(getattr(transformers, architecture.config_class), raw)
    config.vocab_size = min(config.vocab_size, 1024)
    config.pad_token_id = None
    model = shapes_only(getattr(transformers, architecture.base_class), config, spec.dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = torch.empty(parameter.shape, dtype=spec.dtype, device=spec.device)
            _fill(full)
            module._parameters[name] = nn.Parameter(full, requires_grad=False)
    model.to(spec.device)
    layer = model.get_submodule(architecture.in_base(architecture.layers))[0]
    ids_BT = torch.arange(batch * length, device=spec.device) % config.vocab_size
    ids_BT = ids_BT.reshape(batch, length)
    inside: list[float] = []
    marks: list[float] = []

    def enter(*_: Any) -> None:
        synchronize(spec.device)
        marks.append(time.perf_counter())

    def leave(*_: Any) -> None:
        synchronize(spec.device)
        inside.append(time.perf_counter() - marks.pop())

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave)
    whole = timed(lambda: model(input_ids=ids_BT, use_cache=False), spec.device)
    warm = sorted(inside[1:])
    seconds = warm[len(warm) // 2]
    return seconds, max(0.0, whole - seconds)


def _head(spec: ProbeSpec, compute: float) -> tuple[float, float, float]:
    """Seconds per token of the head, of a loss, and of a divergence between logits."""
    width, entries = spec.sizes.hidden_size, spec.sizes.vocab_size
    if 3 * entries * width * spec.dtype.itemsize > free_bytes(spec.device):
        return spec.sizes.head_flops / compute, 0.0, 0.0
    tokens = max(1, min(512, (1 << 25) // entries, int(compute / spec.sizes.head_flops / 4)))
    weight_VC = torch.empty(entries, width, dtype=spec.dtype, device=spec.device)
    stream_TC = torch.empty(tokens, width, dtype=spec.dtype, device=spec.device)
    _fill(weight_VC)
    _fill(stream_TC)
    logits_TV = stream_TC @ weight_VC.T
    targets_T = torch.zeros(tokens, dtype=torch.int64, device=spec.device)
    expected_TV = torch.log_softmax(logits_TV.float(), -1)

    def divergence() -> Tensor:
        got_TV = torch.log_softmax(logits_TV.float(), -1)
        return (expected_TV.exp() * (expected_TV - got_TV)).sum(-1)

    works: tuple[Callable[[], Tensor], ...] = (
        lambda: nn.functional.linear(stream_TC, weight_VC),
        lambda: nn.functional.cross_entropy(logits_TV.float(), targets_T, reduction="none"),
        divergence,
    )
    head, loss, apart = (timed(work, spec.device) / tokens for work in works)
    return head, loss, apart


def _sums(spec: ProbeSpec) -> tuple[dict[str, float], dict[str, float]]:
    """FLOP/s of the products of sums by kind, and seconds per token of what comes with them."""
    width = spec.sizes.hidden_size
    products: dict[str, float] = {}
    beside: dict[str, float] = {}
    full_rate = has_full_rate_float64(spec.device)
    most = min(4096, 1 << 30 if spec.device.type == "cuda" else 1024)
    kinds: dict[str, tuple[int, int]] = {
        kind: (num_regressors(kind, width, inner), inner)
        for kind, inner in spec.inner_sizes.items()
        if kind != "absolute"
    }
    if spec.columns != 0:
        kinds["pairs"] = (width, 0)
    for kind, (regressors, inner) in kinds.items():
        size, tokens, float64, flush = (
            min(regressors, most),
            spec.window_length,
            full_rate,
            FLUSH_TOKENS,
        )
        if kind == "pairs":
            float64 = has_float64_pairs(spec.device, spec.columns is not None)
            flush = PAIR_FLUSH_TOKENS
            tokens = tokens if float64 else flush
        dtype = torch.float32 if kind == "joint" else spec.dtype
        a_TM = torch.ones(tokens, size, dtype=dtype, device=spec.device)
        total_MN = torch.zeros(size, size, dtype=torch.float64, device=spec.device)
        add = functools.partial(
            add_product, total_MN, a_TM, a_TM, float64_products=float64, flush_tokens=flush
        )
        seconds = timed(add, spec.device)
        products[kind] = 2 * tokens * size * size / seconds
        beside[kind] = _beside_products(spec, kind, inner, products[kind])
    return products, beside


def _beside_products(spec: ProbeSpec, kind: str, inner: int, rate: float) -> float:
    """Seconds per token of a real collector less its products; 0 where it is too large to try."""
    width, tokens = spec.sizes.hidden_size, spec.window_length
    collector: Any
    if kind == "pairs":
        flops = pair_flops(width, 1, spec.columns)
        nbytes = 16 * width * width
    else:
        regressors: Regressors = kind  # type: ignore[assignment]
        flops = moments_flops(num_regressors(regressors, width, inner), width)
        nbytes = moments_bytes(regressors, width, inner)
    if flops * tokens / rate > _LONGEST_S or nbytes > 0.2 * free_bytes(spec.device):
        return 0.0
    if kind == "pairs":
        collector = PairCollector([Span(1, 2)], width, spec.device, spec.columns)
    else:
        collector = SpanCollector(
            [(Span(1, 2), SampleKind(regressors))],
            width,
            spec.device,
            inner_size={0: inner},
            norm_eps=1e-6,
        )
    stream_TC = torch.ones(tokens, width, dtype=spec.dtype, device=spec.device)
    inner_TF = torch.ones(tokens, inner, dtype=spec.dtype, device=spec.device)

    def window() -> None:
        if kind == "joint":
            collector.take_mlp(0, 0, inner_TF, stream_TC)
        collector(1, 0, stream_TC)
        collector(2, 0, stream_TC)

    return max(0.0, timed(window, spec.device) / tokens - flops / rate)


def _fits(spec: ProbeSpec, float64: float) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Seconds of a fit and of one step more, at growing sizes up to the model's."""
    width = spec.sizes.hidden_size
    fits: dict[str, Curve] = {}
    steps: dict[str, Curve] = {}
    kinds = {kind: inner for kind, inner in spec.inner_sizes.items() if kind != "absolute"}
    for kind, inner in {"stream": 0, **kinds}.items():
        whole = num_regressors(kind, width, inner)
        size = min(whole, 256)
        fit: list[tuple[int, float]] = []
        step: list[tuple[int, float]] = []
        while True:
            targets = max(1, round(size * width / whole))
            moments = _random_moments(size, targets, spec.device)
            folds = [moments] * _FIT_FOLDS
            fit.append((size, timed(lambda: _fit(kind, folds, targets), spec.device)))  # noqa: B023
            step.append((size, timed(lambda: _step(moments), spec.device)))  # noqa: B023
            larger = min(whole, 2 * size)
            longest = max(fit[-1][1], step_flops(larger, targets) / float64)
            room = 12 * larger * (larger + targets) * 8 < free_bytes(spec.device)
            if size == whole or longest * 6 > _LONGEST_S or not room:
                break
            size = larger
        fits[kind], steps[kind] = Curve(tuple(fit)), Curve(tuple(step))
    return fits, steps


def _fit(kind: str, folds: list[Moments], targets: int) -> None:
    ridge = RelativeRidge(relative=0.1)
    if kind == "joint":
        inner = folds[0].gram_ZZ.shape[0] - targets
        down_FC = folds[0].cross_ZC[targets:] / folds[0].num_tokens
        assert len(down_FC) == inner
        fit_ghost_joint("probe", folds, down_FC, ridge, max_condition=math.inf)
    elif folds[0].gram_ZZ.shape[0] == targets:
        fit_ghost("probe", folds, ridge)
    else:
        for _ in range(num_steps(1, _FIT_FOLDS)):
            _step(folds[0])


def _step(moments: Moments) -> None:
    factor_ZZ, _ = cholesky_factor(moments.gram_ZZ, moments.gram_ZZ.diagonal())
    map_error(moments, torch.cholesky_solve(moments.cross_ZC, factor_ZZ))


def _random_moments(regressors: int, targets: int, device: torch.device) -> Moments:
    """Sums of independent rows, near enough: a unit matrix with a little noise."""
    gram_ZZ = torch.empty(regressors, regressors, dtype=torch.float64, device=device)
    _fill(gram_ZZ)
    gram_ZZ = (gram_ZZ + gram_ZZ.T) / math.sqrt(regressors)
    gram_ZZ.diagonal().add_(2.0)
    cross_ZC = gram_ZZ[:, :targets].clone()
    ones = torch.ones(regressors, dtype=torch.float64, device=device)
    tokens = 4 * regressors
    return Moments(
        tokens, gram_ZZ, cross_ZC, ones, ones[:targets], ones[:targets] * 3, ones[:1] * tokens
    )


def _fill(tensor: Tensor) -> None:
    """Small random numbers, a stretch of them over and over: drawing them all would take longer."""
    flat = tensor.view(-1)
    generator = torch.Generator().manual_seed(0)
    length = min(_FILL, len(flat))
    some = (torch.randn(length, generator=generator) * 0.05).to(tensor.device, tensor.dtype)
    for first in range(0, len(flat), length):
        part = flat[first : first + length]
        part.copy_(some[: len(part)])
