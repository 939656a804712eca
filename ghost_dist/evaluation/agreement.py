"""What the dense, the pruned and the recovered model say of the same windows, in one pass.

Perplexity of each, and how far the other two are from the dense one: KL divergence of their
next-token distributions and the share of positions where their likeliest token is the dense
model's. One uncut model is held; the others run on its weights from the first layer that differs.
Of logits there are never more than of a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.evaluation.divergence import variant_bodies
from ghost_dist.evaluation.perplexity import (
    Head,
    PerplexityResult,
    check_nats,
    evaluating,
    next_tokens,
    token_nats,
)
from ghost_dist.spans import Span

# Shapes: B windows of a batch, T tokens of a window, W all windows, N variants, the dense first.

_FIGURES = 3  # nats, divergence, agreed
FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class WindowScores:
    """One variant on the windows of a corpus; arrays are float64 of shape (W,)."""

    perplexity: PerplexityResult
    """Of the last T - 1 tokens of each window."""
    kl: FloatArray
    """Mean ``KL(dense || variant)`` of all T next-token distributions, nats; 0 for the dense."""
    top1: FloatArray
    """Share of the T positions where both have the same likeliest token; 1 for the dense."""


def score_variants(
    model: Any,
    architecture: Architecture,
    spans: Sequence[Span],
    candidates: Sequence[Mapping[Span, Repair]],
    windows: TokenWindows,
    *,
    batch: int,
    device: torch.device,
    healed: Sequence[Mapping[int, Tensor]] = (),
    advance: Callable[[int], None] = lambda _: None,
) -> list[WindowScores]:
    """Score the dense model and every candidate.

    Parameters
    ----------
    model
        The uncut causal LM on ``device``; evaluated without dropout, the same afterwards.
    architecture, spans
        Of the uncut model, and what is removed.
    candidates
        Repairs by span; an empty mapping is the plain cut.
    windows
        At least two tokens each.
    batch
        Windows per forward.
    device
        Where the tokens go.
    healed
        More down_proj weights (F, C) of each candidate, by layer of the uncut model.
    advance
        Called with the number of tokens just finished.

    Returns
    -------
    list of WindowScores
        Of the dense model, then of each candidate.

    Raises
    ------
    NonFiniteLossError
        If the loss of a window is NaN or Inf; names the first such window.
    """
    sums = np.zeros((_FIGURES, 1 + len(candidates), windows.num_windows))
    batches = variant_bodies(
        model,
        architecture,
        spans,
        candidates,
        windows.tokens,
        batch=batch,
        device=device,
        healed=healed,
    )
    with torch.inference_mode(), evaluating(model):
        for part, head, ids_BT, bodies in batches:
            sums[:, :, part] = batch_scores(head, bodies, ids_BT)
            for nats in sums[0]:
                check_nats(nats[: part.stop], windows)
            advance(ids_BT.numel())
    return window_scores(sums, windows)


def batch_scores(head: Head, bodies: Sequence[Any], ids_BT: Tensor) -> FloatArray:
    """Sums of each window of a batch, from what the bodies of N variants computed.

    Parameters
    ----------
    head
        That gives logits of what bodies computed.
    bodies
        Of the dense model first.
    ids_BT
        The batch.

    Returns
    -------
    numpy.ndarray
        float64 of shape (3, N, B): nats, divergence from the dense model, positions that agree.
    """
    device, length = ids_BT.device, ids_BT.shape[1]
    targets = next_tokens(ids_BT)
    shape = (_FIGURES, len(bodies), ids_BT.shape[0])
    sums = torch.zeros(shape, dtype=torch.float64, device=device)
    for piece in head.pieces(ids_BT):
        window = torch.arange(piece.start, piece.stop, device=device) // length

        def add(figure: int, number: int, values_n: Tensor, window: Tensor = window) -> None:
            sums[figure, number].index_add_(0, window, values_n.to(device, torch.float64))

        for number, body in enumerate(bodies):
            logits_nV = head.logits(body, ids_BT, piece).float()
            add(0, number, token_nats(logits_nV, targets[piece]))
            likeliest = logits_nV.argmax(-1)
            got = torch.log_softmax(logits_nV, -1)
            del logits_nV  # no more than three tensors of this size at once
            if number == 0:
                dense, expected = likeliest, got
            else:
                divergence = torch.sub(expected, got, out=got).mul_(expected.exp())
                add(1, number, divergence.sum(-1))
            add(2, number, likeliest == dense)
    result: FloatArray = sums.cpu().numpy()
    return result


def window_scores(sums: FloatArray, windows: TokenWindows) -> list[WindowScores]:
    """Scores of each variant from sums (3, N, W) of :func:`batch_scores`.

    Raises
    ------
    NonFiniteLossError
        If the loss of a window is NaN or Inf.
    """
    length = windows.window_length
    found = []
    for nats, divergence, agreed in zip(*sums, strict=True):
        check_nats(nats, windows)
        result = PerplexityResult(nats.copy(), windows.num_windows * (length - 1))
        found.append(WindowScores(result, divergence / length, agreed / length))
    return found
