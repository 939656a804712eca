"""Distillation: only the operators are trained, so that the recovered model answers as the dense.

Both models are one: the dense one runs on the same weights without gradient, the recovered one with
its removed layers left out. Nothing below the first operator is run twice, and no gradient is kept
there. The closed form is the starting point, and the result if training does not improve the loss
on held-out windows.

Memory beside the model: float32 master copies of the operators and AdamW's two moments of each,
and the activations of the layers behind the first operator for ``refine.batch`` windows.
"""

import contextlib
import hashlib
import io
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ghost_dist.calibration.split import check_held_out
from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.surgery import repair_stream
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.config import RefineConfig
from ghost_dist.durable import replacing
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.errors import ConfigError
from ghost_dist.evaluation.scores import logit_pieces
from ghost_dist.progress import Reporter
from ghost_dist.spans import Span

# Shapes: B windows of a batch, T tokens of a window, C width, V entries of the vocabulary.

_WARM_UP = 0.03
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Refined:
    """Outcome of a distillation."""

    operators: dict[Span, Repair]  # the best ones, float64
    losses: list[dict[str, float]]  # ``step`` (0: the closed form) and ``loss``, held out
    improved: bool  # on the closed form there


def distill(
    model: Any,
    architecture: Architecture,
    closed_form: Variant,
    tokens: Tokens,
    fitted_on: Collection[int],
    held_out: Sequence[int],
    config: RefineConfig,
    *,
    batch: int,
    state: Path,
    fingerprint: str,
    reporter: Reporter,
) -> Refined:
    """Train the operators; a stopped call continues from its last look at the held-out windows.

    ``tokens``: int32, (windows, T); the rows ``held_out`` are looked at and not trained on, and the
    closed form must not have been fitted on them. ``batch``: windows per forward of that loss.
    ``state``: file of the intermediate state, which must belong to ``fingerprint``.
    """
    check_held_out(fitted_on, held_out, "The closed form that is trained")
    training = sorted(set(range(len(tokens))) - set(held_out))
    if not any(repair.parts() for repair in closed_form.operators.values()):
        raise ConfigError("refine.steps: the plain cut has no operator to train. Set it to 0.")
    student = _Student(LayerwiseModel(model, architecture), closed_form)
    optimiser = torch.optim.AdamW(student.parameters(), config.learning_rate, weight_decay=0.0)
    progress, saved = _Progress(), _saved(state)
    if saved is not None and saved.pop("fingerprint") == fingerprint:
        student.load(saved.pop("student"))
        optimiser.load_state_dict(saved.pop("optimiser"))
        progress = _Progress(**saved)

    def look(step: int) -> None:
        """Note the held-out loss."""
        total = sum(
            student.batch_loss(tokens[list(rows)], backward=False) * len(rows)
            for rows in _chunks(held_out, batch)
        )
        loss = total / len(held_out)
        progress.note(step, loss, student, config.patience)
        now = {"student": student.state(), "optimiser": optimiser.state_dict(), **vars(progress)}
        _save(state, {"fingerprint": fingerprint, **now})
        if not math.isfinite(loss):
            reporter.warn(
                f"refine: the held-out loss at step {step} is NaN or Inf, so training ends there "
                "and the best operators so far are kept. The dtype may overflow: try "
                "model.dtype=float32 or bfloat16, or a smaller refine.learning_rate."
            )
        reporter.event("refine", step=step, loss=loss if math.isfinite(loss) else None)

    if progress.step < 0:
        look(0)
    first = progress.step
    with reporter.stage("refine", config.steps, "steps", first) as advance:
        for step in range(first, config.steps):
            if not progress.going:
                break
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * _schedule(step, config.steps)
            optimiser.zero_grad()
            rows = _rows_of_step(training, config.batch, step)
            size = min(batch, len(rows))
            for part in _chunks(rows, size):
                student.batch_loss(tokens[part], weight=len(part) / len(rows))
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimiser.step()
            advance(1)
            if (step + 1) % config.every == 0 or step + 1 == config.steps:
                look(step + 1)
    best = student.repairs(progress.best or student.state())
    improved = bool(progress.losses[0]["loss"] > progress.best_loss)
    return Refined(best if improved else dict(closed_form.operators), progress.losses, improved)


class _Student:
    """The recovered model with trainable operators, on the weights of the dense one."""

    def __init__(self, layers: LayerwiseModel, recovered: Variant) -> None:
        self._layers, self._recovered = layers, recovered
        self._parts = {
            span: {
                name: nn.Parameter(part.detach().to(layers.device, torch.float32, copy=True))
                for name, part in repair.parts().items()
            }
            for span, repair in recovered.operators.items()
        }

    def parameters(self) -> list[nn.Parameter]:
        return [part for parts in self._parts.values() for part in parts.values()]

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {
            str(span): {name: part.detach().clone() for name, part in parts.items()}
            for span, parts in self._parts.items()
        }

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for span, parts in self._parts.items():
            for name, part in parts.items():
                part.data.copy_(state[str(span)][name])

    def repairs(self, state: Mapping[str, Mapping[str, Tensor]]) -> dict[Span, Repair]:
        return {
            span: Repair.from_parts(
                {name: part.cpu().double() for name, part in state[str(span)].items()},
                self._recovered.operators[span].norm_eps,
            )
            for span in self._parts
        }

    def batch_loss(self, rows: Tokens, *, weight: float = 1.0, backward: bool = True) -> float:
        """Mean KL divergence per token of some windows; adds its gradient times ``weight``."""
        layers = self._layers
        ids_BT = torch.from_numpy(rows.astype(np.int64)).to(layers.device)
        total = 0.0
        with layers.entered(), torch.set_grad_enabled(backward):
            with torch.no_grad():
                entering_BTC, dense_BTC = self._dense(ids_BT)
            found_NC = self._through(entering_BTC).flatten(0, 1)
            # Gradients stop between layers and head, so that logits live for one piece at a time.
            leaf_NC = found_NC.detach().requires_grad_(backward)
            dense_NC = dense_BTC.flatten(0, 1)
            for piece in logit_pieces(
                ids_BT.numel(), layers.architecture.vocab_size, layers.device
            ):
                dense_NV, found_NV = (
                    torch.log_softmax(layers.logits(stream_NC[piece]).float(), -1)
                    for stream_NC in (dense_NC, leaf_NC)
                )
                loss = nn.functional.kl_div(found_NV, dense_NV, reduction="sum", log_target=True)
                loss = loss / ids_BT.numel()
                total += float(loss.detach())
                if backward:
                    torch.autograd.backward(loss * weight)
            if backward:
                torch.autograd.backward(found_NC, leaf_NC.grad)
        return total

    def _dense(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The dense stream entering the first layer that differs, and the last one."""
        entering_BTC = stream_BTC = self._layers.embed(ids_BT)
        for layer in range(self._layers.num_layers):
            if layer == self._recovered.first_changed:
                entering_BTC = stream_BTC
            with self._layers.running(layer) as run:
                stream_BTC = run(stream_BTC)
        return entering_BTC, stream_BTC

    def _through(self, stream_BTC: Tensor) -> Tensor:
        """The last stream of the recovered model, with gradients to the parts."""
        first = self._recovered.first_changed
        assert first is not None, "there is something to train"
        operators = {
            span.stop: Repair.from_parts(
                {name: part for name, part in parts.items() if name != "down"},
                self._recovered.operators[span].norm_eps,
            )
            for span, parts in self._parts.items()
        }
        downs = {s.start - 1: p["down"] for s, p in self._parts.items() if "down" in p}
        for layer in range(first, self._layers.num_layers):
            if layer not in self._recovered.removed:
                with contextlib.ExitStack() as stack:
                    run = stack.enter_context(self._layers.running(layer))
                    if layer in downs:
                        module = self._layers.down_projection(layer)
                        stack.enter_context(module.register_forward_hook(_product(downs[layer])))
                    stream_BTC = run(stream_BTC)
            if layer + 1 in operators:
                stream_BTC = repair_stream(operators[layer + 1], stream_BTC)
        return stream_BTC


@dataclass
class _Progress:
    """Held-out losses so far, and the best operators."""

    step: int = -1  # of the last look
    losses: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, dict[str, Tensor]] | None = None
    best_loss: float = math.inf
    going: bool = True  # not yet so many looks without a better one as there is patience for
    looks_without: int = 0

    def note(self, step: int, loss: float, student: _Student, patience: int) -> None:
        self.step = step
        self.losses.append({"step": step, "loss": loss})
        if loss < self.best_loss:
            self.best_loss, self.best, self.looks_without = loss, student.state(), 0
        else:
            self.looks_without += 1
        self.going = self.looks_without < patience and math.isfinite(loss)


def _save(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(hashlib.sha256(buffer.getbuffer()).digest())
        file.write(buffer.getbuffer())


def _saved(path: Path) -> dict[str, Any] | None:
    """What :func:`_save` wrote; None if it is absent or damaged."""
    try:
        stored = memoryview(path.read_bytes())
    except OSError:
        return None
    digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:  # torch does not look at checksums
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


def _product(down_FC: Tensor) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], _: Tensor) -> Tensor:
        return nn.functional.linear(args[0], down_FC.T.to(args[0].dtype), module.bias)

    return hook


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 0."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _rows_of_step(training: Sequence[int], batch: int, step: int) -> list[int]:
    """Windows of a step: every epoch in an order of its own, the same in every run."""
    size = min(batch, len(training))
    per_epoch = len(training) // size
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng(epoch).permutation(len(training))
    return [training[i] for i in order[place * size : (place + 1) * size]]


def _chunks(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])
