"""Fixed windows of token ids: built from a source, hashed, kept in one safetensors file.

source -> ``corpora`` (documents) -> ``packing`` (one stream of tokens) -> rows of equal length; or
by ``sampling``, tokens of places that are spread over the source.
No window holds padding; what does not fill a whole window is left out.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import safetensors
import safetensors.numpy

from ghost_dist.calibration.packing import OnProgress, TokenArray
from ghost_dist.calibration.sampling import Text, spread_tokens
from ghost_dist.durable import write_bytes
from ghost_dist.errors import CalibrationError, CorruptStoreError

Tokens: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

_FORMAT = "ghost_dist token windows 1"


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of token ids and where they are from; compare them by ``fingerprint``."""

    tokens: Tokens
    """int32, shape (num_windows, window_length), read-only."""
    source: str
    """The source as the user wrote it; several are joined."""
    source_of: tuple[int, ...] = ()
    """The number of each window's source, where there are several."""

    def __post_init__(self) -> None:
        assert self.tokens.dtype == np.int32, "token ids are int32"
        assert self.tokens.ndim == 2, "one row a window"
        self.tokens.flags.writeable = False

    @property
    def num_windows(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def window_length(self) -> int:
        return int(self.tokens.shape[1])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of the token ids (little endian) and their shape."""
        digest = hashlib.sha256(f"{self.tokens.shape}{self.source_of or ''}".encode())
        digest.update(np.ascontiguousarray(self.tokens, dtype="<i4").data)
        return digest.hexdigest()


def build_windows(
    source: str,
    tokenizer: Any,
    *,
    windows: int | None,
    window_length: int,
    seed: int | None,
    special_tokens: bool,
    window_bos: bool,
    vocab_size: int,
    sampling: Literal["beginning", "spread"] = "beginning",
    split: str = "train",
    on_progress: OnProgress | None = None,
) -> TokenWindows:
    """Cut a corpus into windows, from its beginning or at places that are spread over it.

    ``windows`` None: all whole ones, which holds the whole text in memory. ``seed`` orders the
    documents of a dataset (None keeps its own order, as perplexity wants it) and places spread
    windows. ``special_tokens``: the tokenizer adds its own to every document. ``window_bos``: each
    window is BOS and ``window_length - 1`` tokens of text. ``split`` is for a dataset whose source
    names none.
    """
    bos = _bos(tokenizer) if window_bos else None
    text_length = window_length - (0 if bos is None else 1)
    if text_length < 1 or (windows is not None and windows < 1):
        raise CalibrationError(
            f"Cannot cut {windows} windows of {window_length} tokens; at least one window of "
            f"{1 if bos is None else 2} tokens is needed."
        )
    needed = None if windows is None else windows * text_length
    text = Text(source, tokenizer, seed, special_tokens, split)
    if sampling == "spread":
        assert windows is not None
        stream = spread_tokens(
            text, windows=windows, window_length=text_length, on_progress=on_progress
        )
    else:
        with text.opened() as (corpus, pieces):
            stream = text.pack(corpus, pieces, needed=needed, on_progress=on_progress)
    count = len(stream) // text_length
    if count < (windows or 1):
        raise CalibrationError(
            f"{source} gives {len(stream):,} tokens; {(needed or text_length):,} are needed for "
            f"{windows or 1} windows of {window_length}"
            f"{' (one of each is BOS)' if bos is not None else ''}. Give more text, shorter windows"
            + (f", or at most {count} windows." if count else ".")
        )
    rows = stream[: count * text_length].reshape(count, text_length)
    if bos is not None:
        rows = np.concatenate([np.full((count, 1), bos, dtype=np.int64), rows], axis=1)
    check_vocabulary(rows, tokenizer, vocab_size)
    return TokenWindows(rows.astype(np.int32), source)


def join_windows(of_sources: Sequence[TokenWindows]) -> TokenWindows:
    """Windows of several sources, each knowing its own; of one as they are."""
    if len(of_sources) == 1:
        return of_sources[0]
    return TokenWindows(
        np.concatenate([windows.tokens for windows in of_sources]),
        ", ".join(windows.source for windows in of_sources),
        tuple(n for n, windows in enumerate(of_sources) for _ in windows.tokens),
    )


def save_windows(path: Path, windows: TokenWindows) -> None:
    """Write windows to a safetensors file that is either whole or absent."""
    metadata = {
        "format": _FORMAT,
        "source": windows.source,
        "source_of": json.dumps(windows.source_of),
        "fingerprint": windows.fingerprint,
    }
    write_bytes(path, safetensors.numpy.save({"tokens": windows.tokens}, metadata))


def load_windows(path: Path) -> TokenWindows:
    remedy = "recover builds it anew from the source."
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CorruptStoreError(
                    f"{path} holds {metadata.get('format')!r}, expected {_FORMAT!r}. {remedy}"
                )
            tokens = file.get_tensor("tokens")
            source_of = tuple(map(int, json.loads(metadata.get("source_of", "[]"))))
    except (OSError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise CorruptStoreError(f"{path} cannot be read: {error}. {remedy}") from error
    if tokens.dtype != np.int32 or tokens.ndim != 2:
        raise CorruptStoreError(
            f"{path} holds {tokens.dtype} of shape {tokens.shape}, expected int32 rows. {remedy}"
        )
    windows = TokenWindows(tokens, metadata.get("source", ""), source_of)
    expected = metadata.get("fingerprint")
    if windows.fingerprint != expected:
        raise CorruptStoreError(
            f"{path} is damaged: its tokens have sha256 {windows.fingerprint}, expected "
            f"{expected}. {remedy}"
        )
    return windows


def _bos(tokenizer: Any) -> int:
    bos: int | None = tokenizer.bos_token_id
    if bos is None:
        raise CalibrationError(
            "Each window is to begin with BOS (window_bos), but the tokenizer has no BOS token. "
            "Set calibration.window_bos=false."
        )
    return bos


def check_vocabulary(tokens: TokenArray, tokenizer: Any, vocab_size: int) -> None:
    """Raise CalibrationError if a token id has no row in the model's embedding."""
    outside = tokens[(tokens >= vocab_size) | (tokens < 0)]
    if outside.size:
        raise CalibrationError(
            f"The tokenizer does not match the model: it gives token id {outside[0]}, and the "
            f"model has {vocab_size} embeddings (ids 0 to {vocab_size - 1}); the tokenizer has "
            f"{len(tokenizer)} tokens. Use the tokenizer that belongs to the model."
        )
