"""Perplexity over fixed windows: sums of nats and of predicted tokens, divided once at the end.

Each window of T tokens is run alone, without KV cache, and predicts its last T - 1 tokens. Logits
are computed in the model's dtype and turned into nats in float32.

The body runs once a batch; the head runs over few tokens at a time, since the logits of a window
may be larger than the model's layers (2048 tokens x 128k entries are 1 GiB in float32). The head
is the model's own ``forward`` with its body answering from what it computed before, so that
soft-capping and logit scales of every family stay where their authors put them. A model that
cannot be run so gives its logits in one piece; the result is the same.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.errors import GhostDistError

# Shapes: B windows of a batch, T tokens of a window, N = B T positions, C width, V entries.

_LOGITS_AT_ONCE = 1 << 25  # entries: 128 MiB in float32
_NO_TARGET = -100  # what cross_entropy leaves out: the last token of a window predicts nothing
_PROBE_TOKENS = 16
_PROBE_TOLERANCE = 0.02  # of the largest logit; a body that ran again is off by about all of it


class NonFiniteLossError(GhostDistError):
    """The loss of a window is NaN or Inf, so no perplexity of it would mean anything."""

    def __init__(self, window: int, source: str) -> None:
        super().__init__(
            f"The loss of window {window} of {source} is not finite (NaN or Inf). The weights may "
            "be damaged, or the dtype may overflow: try model.dtype=float32 or bfloat16."
        )
        self.window, self.source = window, source

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.window, self.source))


@dataclass(frozen=True, eq=False)
class PerplexityResult:
    """Sums, so that results of disjoint windows add up."""

    nats_per_window: np.ndarray[Any, np.dtype[np.float64]]
    """Negative log likelihood of each window, nats, float64, shape (num_windows,)."""
    num_tokens: int
    """Number of predicted tokens, ``T - 1`` of each window."""

    @property
    def nats_sum(self) -> float:
        """Negative log likelihood of all windows, nats."""
        return math.fsum(self.nats_per_window)

    @property
    def value(self) -> float:
        """Perplexity: exp of the nats per predicted token."""
        nats_per_token = self.nats_sum / self.num_tokens
        return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def perplexity(
    model: Any,
    windows: TokenWindows,
    *,
    batch: int,
    device: torch.device | str,
    on_progress: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of a causal language model over windows.

    Parameters
    ----------
    model
        A transformers model with a language-model head, on ``device``; evaluated without dropout.
    windows
        Token windows; at least two tokens each.
    batch
        Windows per forward.
    device
        Where the tokens go.
    on_progress
        Called with the number of tokens just finished, ``T`` for each window.

    Raises
    ------
    NonFiniteLossError
        If the loss of a window is NaN or Inf; names the first such window.
    """
    assert batch >= 1, "a forward takes a window at least"
    assert windows.window_length >= 2, "a window must predict something"
    nats = np.zeros(windows.num_windows, dtype=np.float64)
    with torch.inference_mode(), evaluating(model):
        head: HeadRunner | None = None
        for first in range(0, windows.num_windows, batch):
            rows = windows.tokens[first : first + batch].astype(np.int64)
            ids_BT = torch.from_numpy(rows).to(device)
            head = head or HeadRunner(model, ids_BT)
            nats_B = window_nats(head, head.body(ids_BT), ids_BT)
            nats[first : first + batch] = nats_B
            if on_progress is not None:
                on_progress(ids_BT.numel())
            check_nats(nats[: first + batch], windows)
    return PerplexityResult(nats, windows.num_windows * (windows.window_length - 1))


def check_nats(nats: np.ndarray[Any, np.dtype[np.float64]], windows: TokenWindows) -> None:
    """Raise NonFiniteLossError for the first window whose loss is not finite."""
    bad = np.flatnonzero(~np.isfinite(nats))
    if bad.size:
        raise NonFiniteLossError(int(bad[0]), windows.source)


class Head(Protocol):
    """Gives logits of some positions at a time, from what a model's body computed."""

    def pieces(self, ids_BT: Tensor) -> Iterator[slice]:
        """Slices of the B x T positions, window after window, small enough for their logits."""

    def logits(self, body: Any, ids_BT: Tensor, piece: slice) -> Tensor:
        """Logits (n, V) of some positions, in the model's dtype."""


def logit_pieces(num_positions: int, vocab_size: int) -> Iterator[slice]:
    """Slices of positions, small enough for their logits."""
    size = max(1, _LOGITS_AT_ONCE // vocab_size)
    for start in range(0, num_positions, size):
        yield slice(start, min(start + size, num_positions))


def next_tokens(ids_BT: Tensor) -> Tensor:
    """What each of the B x T positions predicts, window after window; the last of one nothing."""
    targets_BT = torch.full_like(ids_BT, _NO_TARGET)
    targets_BT[:, :-1] = ids_BT[:, 1:]
    return targets_BT.flatten()


def token_nats(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    """Nats of each target, float32; 0 where nothing is predicted."""
    return torch.nn.functional.cross_entropy(
        logits_nV.float(),
        targets_n.to(logits_nV.device),
        reduction="none",
        ignore_index=_NO_TARGET,
    )


def window_nats(head: Head, body: Any, ids_BT: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Nats of each window of a batch, from what the body computed."""
    targets_N = next_tokens(ids_BT)
    nats_N = torch.empty(targets_N.shape, dtype=torch.float64, device=ids_BT.device)
    for piece in head.pieces(ids_BT):
        logits_nV = head.logits(body, ids_BT, piece)
        nats_N[piece] = token_nats(logits_nV, targets_N[piece]).to(nats_N.device, torch.float64)
    result: np.ndarray[Any, np.dtype[np.float64]] = (
        nats_N.view(ids_BT.shape[0], -1).sum(dim=1).cpu().numpy()
    )
    return result


class HeadRunner:
    """Runs the body of a causal LM once and its head over few tokens at a time.

    Parameters
    ----------
    model
        A transformers causal LM.
    ids_BT
        Some of the tokens, to try on whether the head can be run by itself.
    """

    def __init__(self, model: Any, ids_BT: Tensor) -> None:
        self._model = model
        self._by_itself = _answers_from_body(model, ids_BT[:1, :_PROBE_TOKENS])

    def body(self, ids_BT: Tensor) -> Any:
        """What :meth:`logits` needs of a batch: the body's output, or all logits."""
        if self._by_itself:
            return self._model.base_model(input_ids=ids_BT, use_cache=False)
        return self._model(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)

    def pieces(self, ids_BT: Tensor) -> Iterator[slice]:
        """Slices of the B x T positions, window after window, small enough for their logits."""
        yield from logit_pieces(ids_BT.numel(), self._model.config.get_text_config().vocab_size)

    def logits(self, body: Any, ids_BT: Tensor, piece: slice) -> Tensor:
        """Logits (n, V) of some positions, in the model's dtype."""
        if not self._by_itself:
            logits_nV: Tensor = body[piece]
            return logits_nV
        hidden_NC = body.last_hidden_state.flatten(0, 1)
        with _answering(self._model.base_model, body, hidden_NC[None, piece]):
            found: Tensor = self._model(
                input_ids=ids_BT.flatten()[None, piece], use_cache=False
            ).logits[0]
        return found


def _answers_from_body(model: Any, ids_1T: Tensor) -> bool:
    """Whether the model gives the same logits when its body answers with given hidden states.

    Tried on the second half of a few tokens, where a body that ran again would not know the first.
    """
    half = ids_1T.shape[1] // 2
    expected = model(input_ids=ids_1T, use_cache=False).logits[:, half:].float()
    try:
        body = model.base_model  # the model itself where a family names no body: no hidden states
        output = body(input_ids=ids_1T, use_cache=False)
        with _answering(body, output, output.last_hidden_state[:, half:]):
            got = model(input_ids=ids_1T[:, half:], use_cache=False).logits.float()
    except (AttributeError, TypeError, KeyError, IndexError):
        return False
    scale = float(expected.abs().max())
    return torch.allclose(got, expected, rtol=0, atol=_PROBE_TOLERANCE * scale)


@contextlib.contextmanager
def _answering(body: Any, output: Any, hidden_1TC: Tensor) -> Iterator[None]:
    """Let ``body`` return ``output`` with other hidden states."""
    answer = copy.copy(output)
    answer["last_hidden_state"] = hidden_1TC
    own = body.__dict__.get("forward")  # an instance may have one already (accelerate's hooks)
    body.forward = lambda *_args, **_kwargs: answer
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
