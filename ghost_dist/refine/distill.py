"""Distillation: only the operators are trained, so that the recovered model answers as the dense.

Both models are one: the dense one runs on the same weights without gradient, the recovered one with
its removed layers bypassed. Nothing below the first operator is run twice, and no gradient is kept
there. The closed form is the starting point, and the result if training does not improve the loss
on held-out windows.

Memory beside the model: float32 master copies of the operators and AdamW's two moments of each,
and the activations of the layers behind the first operator for ``refine.batch`` windows.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ghost_dist.calibration.split import check_held_out
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.surgery import (
    as_recovered,
    bypassed,
    down_path,
    entering_at,
    repair_hook,
)
from ghost_dist.config import RefineConfig
from ghost_dist.durable import replacing
from ghost_dist.errors import ConfigError
from ghost_dist.evaluation.divergence import first_changed_layer
from ghost_dist.evaluation.perplexity import HeadRunner
from ghost_dist.progress import Reporter
from ghost_dist.spans import Span

# Shapes: B windows of a batch, T tokens of a window, C width, V entries of the vocabulary.

_WARM_UP = 0.03
_DIGEST_BYTES = 32

Tokens = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Refined:
    """Outcome of a distillation.

    Attributes
    ----------
    operators
        The best ones, float64.
    losses
        ``{"step", "loss"}`` of every look at the held-out windows; step 0 is the closed form.
    improved
        Whether training beat the closed form there.
    """

    operators: dict[Span, Repair]
    losses: list[dict[str, float]]
    improved: bool


def distill(
    model: Any,
    architecture: Architecture,
    spans: Sequence[Span],
    operators: Mapping[Span, Repair],
    healed: Mapping[int, Tensor],
    tokens: Tokens,
    fitted_on: Collection[int],
    held_out: Sequence[int],
    config: RefineConfig,
    *,
    device: torch.device,
    batch: int,
    state: Path,
    fingerprint: str,
    reporter: Reporter,
) -> Refined:
    """Train the operators; a stopped call continues from its last look at the held-out windows.

    Parameters
    ----------
    model, architecture
        The uncut causal LM on ``device``; its weights are not changed.
    spans, operators
        What is removed, and the closed form.
    healed
        New down_proj weights that stay as they are.
    tokens
        int32, shape (windows, T).
    fitted_on
        Rows of ``tokens`` that the closed form or a healed weight was fitted on.
    held_out
        Rows that are looked at and not trained on; none of ``fitted_on``.
    config
        Steps, loss, learning rate.
    batch
        Windows per forward of the held-out loss; ``config.batch`` for training.
    state, fingerprint
        File of the intermediate state, and what it must belong to.
    reporter
        Where progress goes.

    Raises
    ------
    ConfigError
        If there is nothing to train, or no window to train on.
    NotHeldOutError
        If the closed form has seen what is to judge it.
    """
    check_held_out(fitted_on, held_out, "The closed form that is trained")
    training = sorted(set(range(len(tokens))) - set(held_out))
    if not any(repair.parts() for repair in operators.values()):
        raise ConfigError("refine.steps: the plain cut has no operator to train. Set it to 0.")
    if not training or not held_out:
        raise ConfigError("refine.steps needs windows to train on and windows to hold out.")
    student = _Student(model, architecture, spans, operators, healed, device)
    optimiser = torch.optim.AdamW(student.parameters(), config.learning_rate, weight_decay=0.0)
    loss_of = _Loss(config)
    progress = _Progress(state, fingerprint)
    progress.resume(student, optimiser)

    def look(step: int) -> bool:
        """Note the held-out loss; False if it is time to stop."""
        total = sum(
            student.batch_loss(tokens[list(rows)], loss_of, backward=False) * len(rows)
            for rows in _chunks(held_out, batch)
        )
        loss = total / len(held_out)
        going = progress.note(step, loss, student, config.patience)
        progress.save(step, student, optimiser)
        if not math.isfinite(loss):
            reporter.warn(
                f"refine: the held-out loss at step {step} is NaN or Inf, so training ends there "
                "and the best operators so far are kept. The dtype may overflow: try "
                "model.dtype=float32 or bfloat16, or a smaller refine.learning_rate."
            )
        reporter.event("refine", step=step, loss=loss if math.isfinite(loss) else None)
        return going

    going = progress.going or (progress.step < 0 and look(0))
    first = max(progress.step, 0)
    with reporter.stage("refine", config.steps, "steps", first) as advance:
        for step in range(first, config.steps):
            if not going:
                break
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * _schedule(step, config.steps)
            optimiser.zero_grad()
            rows = _rows_of_step(training, config.batch, step)
            size = min(batch, len(rows))
            for part in _chunks(rows, size):
                student.batch_loss(tokens[part], loss_of, weight=len(part) / len(rows))
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimiser.step()
            advance(1)
            if (step + 1) % config.every == 0 or step + 1 == config.steps:
                going = look(step + 1)
    best = student.repairs(progress.best or student.state())
    improved = bool(progress.losses[0]["loss"] > progress.best_loss)
    return Refined(best if improved else dict(operators), progress.losses, improved)


class _Student:
    """The recovered model with trainable operators, on the weights of the dense one."""

    def __init__(
        self,
        model: Any,
        architecture: Architecture,
        spans: Sequence[Span],
        operators: Mapping[Span, Repair],
        healed: Mapping[int, Tensor],
        device: torch.device,
    ) -> None:
        self._model, self._architecture, self._spans = model, architecture, spans
        self._healed, self._device = dict(healed), device
        self._eps = {span: repair.norm_eps for span, repair in operators.items()}
        self._parts = {
            span: {
                name: nn.Parameter(part.detach().to(device, torch.float32, copy=True))
                for name, part in repair.parts().items()
            }
            for span, repair in operators.items()
        }
        self._layers = model.get_submodule(architecture.layers)
        changed = [first_changed_layer(spans, [operators]), *self._healed]
        self._first = min(changed)
        self._head: HeadRunner | None = None

    def parameters(self) -> list[nn.Parameter]:
        return [part for parts in self._parts.values() for part in parts.values()]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Copies of all parts by span and name."""
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
                self._eps[span],
            )
            for span in self._parts
        }

    def batch_loss(
        self, rows: Tokens, loss_of: _Loss, *, weight: float = 1.0, backward: bool = True
    ) -> float:
        """Mean loss per token of some windows; adds its gradient times ``weight``."""
        ids_BT = torch.from_numpy(rows.astype(np.int64)).to(self._device)
        with torch.no_grad():
            self._head = self._head or HeadRunner(self._model, ids_BT)
            dense, stream_BTC = self._dense(ids_BT)
        with torch.set_grad_enabled(backward), self._recovered(stream_BTC):
            found = self._head.body(ids_BT)
        # Gradients stop between body and head, so that logits live for one piece at a time.
        output, leaf = _leaf(found, backward)
        total = 0.0
        with torch.set_grad_enabled(backward):
            for piece in self._head.pieces(ids_BT):
                loss = loss_of(self._head, dense, output, ids_BT, piece) / ids_BT.numel()
                total += float(loss.detach())
                if backward:
                    torch.autograd.backward(loss * weight)
        if backward:
            hidden = found if isinstance(found, Tensor) else found.last_hidden_state
            torch.autograd.backward(hidden, leaf.grad)
        return total

    def _dense(self, ids_BT: Tensor) -> tuple[Any, Tensor]:
        kept: list[Tensor] = []

        def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[:] = [args[0] if args else kwargs["hidden_states"]]

        assert self._head is not None
        handle = self._layers[self._first].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            return self._head.body(ids_BT), kept[0]
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _recovered(self, stream_BTC: Tensor) -> Iterator[None]:
        """Let the model compute as the recovered one, with gradients to the parts."""
        layers, architecture = self._layers, self._architecture
        removed = [layer for span in self._spans for layer in range(span.start, span.stop)]
        handles = []
        for span, parts in self._parts.items():
            boundary = {name: part for name, part in parts.items() if name != "down"}
            if boundary:
                at_end = span.stop == len(layers)
                module = (
                    self._model.get_submodule(architecture.final_norm)
                    if at_end
                    else layers[span.stop]
                )
                repair = Repair.from_parts(boundary, self._eps[span])
                handles.append(
                    module.register_forward_pre_hook(repair_hook(repair), with_kwargs=True)
                )
            if "down" in parts:
                module = layers[span.start - 1].get_submodule(down_path(architecture))
                handles.append(module.register_forward_hook(_product(parts["down"])))
        try:
            with (
                as_recovered(self._model, architecture, (), {}, self._healed),
                bypassed(self._model, layers, removed),
                entering_at(self._model, layers, self._first, stream_BTC),
            ):
                yield
        finally:
            for handle in handles:
                handle.remove()


class _Loss:
    """Sum over tokens of the loss between dense and recovered model."""

    def __init__(self, config: RefineConfig) -> None:
        self._config = config

    def __call__(
        self, head: HeadRunner, dense: Any, found: Any, ids_BT: Tensor, piece: slice
    ) -> Tensor:
        config = self._config
        if config.loss == "hidden":
            if isinstance(found, Tensor):
                raise ConfigError(
                    "refine.loss=hidden: this family gives logits only. Use refine.loss=kl."
                )
            target_NC = dense.last_hidden_state.flatten(0, 1)[piece].float()
            got_NC = found.last_hidden_state.flatten(0, 1)[piece].float()
            error: Tensor = (got_NC - target_NC).square().sum() / target_NC.shape[-1]
            return error
        target_NV = head.logits(dense, ids_BT, piece).float() / config.temperature
        got_NV = head.logits(found, ids_BT, piece).float() / config.temperature
        if config.top_k is not None and config.top_k < target_NV.shape[-1]:
            target_NV, likeliest = target_NV.topk(config.top_k, dim=-1)
            got_NV = got_NV.gather(-1, likeliest)
        expected, got = torch.log_softmax(target_NV, -1), torch.log_softmax(got_NV, -1)
        divergence: Tensor = (expected.exp() * (expected - got)).sum()
        return divergence


class _Progress:
    """Held-out losses so far, the best operators, and their file."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path, self._fingerprint = path, fingerprint
        self.step = -1
        self.losses: list[dict[str, float]] = []
        self.best: dict[str, dict[str, Tensor]] | None = None
        self.best_loss = math.inf
        self.going = False
        self._looks_without = 0

    def resume(self, student: _Student, optimiser: torch.optim.Optimizer) -> None:
        """Take up the file's state if it is of this distillation; a damaged one is ignored."""
        try:
            stored = memoryview(self._path.read_bytes())
        except OSError:
            return
        digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:  # torch does not look at checksums
            return
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if saved["fingerprint"] != self._fingerprint:
            return
        student.load(saved["student"])
        optimiser.load_state_dict(saved["optimiser"])
        self.step, self.losses = saved["step"], saved["losses"]
        self.best, self.best_loss = saved["best"], saved["best_loss"]
        self.going, self._looks_without = saved["going"], saved["looks_without"]

    def note(self, step: int, loss: float, student: _Student, patience: int) -> bool:
        """Remember a look; whether to go on."""
        self.step = step
        self.losses.append({"step": step, "loss": loss})
        if loss < self.best_loss:
            self.best_loss, self.best, self._looks_without = loss, student.state(), 0
        else:
            self._looks_without += 1
        self.going = self._looks_without < patience and math.isfinite(loss)
        return self.going

    def save(self, step: int, student: _Student, optimiser: torch.optim.Optimizer) -> None:
        """Write the state; it is whole or absent."""
        content = {
            "fingerprint": self._fingerprint,
            "step": step,
            "student": student.state(),
            "optimiser": optimiser.state_dict(),
            "losses": self.losses,
            "best": self.best,
            "best_loss": self.best_loss,
            "going": self.going,
            "looks_without": self._looks_without,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        with replacing(self._path) as temporary, temporary.open("wb") as file:
            file.write(hashlib.sha256(buffer.getbuffer()).digest())
            file.write(buffer.getbuffer())


def _product(down_FC: Tensor) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], _: Tensor) -> Tensor:
        return nn.functional.linear(args[0], down_FC.T.to(args[0].dtype), module.bias)

    return hook


def _leaf(found: Any, backward: bool) -> tuple[Any, Tensor]:
    """The body's output with a hidden state (or logits) that collects gradients by itself."""
    if isinstance(found, Tensor):
        leaf = found.detach().requires_grad_(backward)
        return leaf, leaf
    leaf = found.last_hidden_state.detach().requires_grad_(backward)
    output = copy.copy(found)
    output["last_hidden_state"] = leaf
    return output, leaf


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
