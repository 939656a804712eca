"""How far recovered models are from the dense one: KL divergence of their next-token distributions.

Several candidates are compared on the same windows. The dense model runs once a batch; each
candidate only runs what lies behind the first thing that differs, on the same weights in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.repair import Repair, down_projections
from ghost_dist.checkpoint.surgery import as_recovered, entering_at
from ghost_dist.evaluation.perplexity import Head, HeadRunner
from ghost_dist.spans import Span

# Shapes: B windows of a batch, T tokens of a window, C width, V entries of the vocabulary.


def divergences(
    model: Any,
    architecture: Architecture,
    spans: Sequence[Span],
    candidates: Sequence[Mapping[Span, Repair]],
    tokens: np.ndarray[Any, np.dtype[np.int32]],
    *,
    batch: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Mean KL divergence of each candidate from the dense model, in nats per token.

    Parameters and errors as for :func:`window_divergences`; NaN or Inf as computed.
    """
    found = window_divergences(
        model, architecture, spans, candidates, tokens, batch=batch, device=device, advance=advance
    )
    means: list[float] = found.mean(1).tolist()
    return means


def window_divergences(
    model: Any,
    architecture: Architecture,
    spans: Sequence[Span],
    candidates: Sequence[Mapping[Span, Repair]],
    tokens: np.ndarray[Any, np.dtype[np.int32]],
    *,
    batch: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """KL divergence of each candidate from the dense model, window by window.

    Parameters
    ----------
    model
        The uncut causal LM on ``device``; it is the same afterwards.
    architecture, spans
        Of the uncut model, and what is removed.
    candidates
        Repairs by span; an empty mapping is the plain cut.
    tokens
        int32, shape (windows, T). Every position counts.
    batch
        Windows per forward.
    device
        Where the tokens go.
    advance
        Called with the number of tokens just finished.

    Returns
    -------
    Tensor
        Mean ``KL(dense || candidate)`` per token of each window, (candidates, windows) float64.
    """
    shape = (len(candidates), len(tokens))
    sums = torch.zeros(shape, dtype=torch.float64, device=device)
    batches = variant_bodies(
        model, architecture, spans, candidates, tokens, batch=batch, device=device
    )
    with torch.inference_mode():
        for part, head, ids_BT, (dense, *others) in batches:
            add_divergences(head, dense, others, ids_BT, sums[:, part])
            advance(ids_BT.numel())
    per_token: Tensor = sums / tokens.shape[1]
    return per_token


def variant_bodies(
    model: Any,
    architecture: Architecture,
    spans: Sequence[Span],
    candidates: Sequence[Mapping[Span, Repair]],
    tokens: np.ndarray[Any, np.dtype[np.int32]],
    *,
    batch: int,
    device: torch.device,
    healed: Sequence[Mapping[int, Tensor]] = (),
) -> Iterator[tuple[slice, HeadRunner, Tensor, list[Any]]]:
    """Run the dense model and every candidate over the windows, on one model's weights.

    To be gone through under ``torch.inference_mode()``; other parameters as for
    :func:`window_divergences`.

    Parameters
    ----------
    healed
        More down_proj weights (F, C) of each candidate, by layer of the uncut model; empty: none.

    Yields
    ------
    part, head, ids_BT, bodies
        The batch's windows, what gives logits of a body, the tokens (B, T), and what the body of
        the dense model and of each candidate computed.
    """
    own = healed or [{} for _ in candidates]
    first = min([first_changed_layer(spans, candidates), *(layer for one in own for layer in one)])
    layers = model.get_submodule(architecture.layers)
    kept: list[Tensor] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept[:] = [args[0] if args else kwargs["hidden_states"]]

    head: HeadRunner | None = None
    for start in range(0, len(tokens), batch):
        part = slice(start, min(start + batch, len(tokens)))
        ids_BT = torch.from_numpy(tokens[part].astype(np.int64)).to(device)
        head = head or HeadRunner(model, ids_BT)
        handle = layers[first].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            bodies = [head.body(ids_BT)]
        finally:
            handle.remove()
        for candidate, downs in zip(candidates, own, strict=True):
            with (
                as_recovered(model, architecture, spans, candidate, downs),
                entering_at(model, layers, first, kept[0]),
            ):
                bodies.append(head.body(ids_BT))
        yield part, head, ids_BT, bodies


def add_divergences(
    head: Head, dense: Any, others: Sequence[Any], ids_BT: Tensor, sums_NB: Tensor
) -> None:
    """Add the divergences of a batch's tokens from the dense model, window by window.

    Parameters
    ----------
    head
        That gives logits of what bodies computed.
    dense, others
        What the body of the dense model, and of N others, computed.
    ids_BT
        The batch.
    sums_NB
        float64, changed in place.
    """
    length, device = ids_BT.shape[1], sums_NB.device
    for piece in head.pieces(ids_BT):
        expected = torch.log_softmax(head.logits(dense, ids_BT, piece).float(), -1)
        for number, other in enumerate(others):
            got = torch.log_softmax(head.logits(other, ids_BT, piece).float(), -1)
            divergence = (expected.exp() * (expected - got)).sum(-1)
            window = torch.arange(piece.start, piece.stop, device=device) // length
            sums_NB[number].index_add_(0, window, divergence.to(device, torch.float64))


def first_changed_layer(spans: Sequence[Span], candidates: Sequence[Mapping[Span, Repair]]) -> int:
    """The first layer whose input all candidates still share with the dense model."""
    changed = [layer for candidate in candidates for layer in down_projections(candidate)]
    return min([spans[0].start, *changed])
