"""Fixed windows of token ids: built from a source, hashed, kept in one safetensors file.

No window holds padding; what does not fill a whole window is left out.

WikiText-2, PTB and C4 are also cut as the published code of arXiv 2605.15491 does, from the hub.
WikiText-2 and PTB: all rows of one split joined by a blank line and tokenised as one text, with
whatever special tokens the tokenizer adds to a text. C4: one window from a random place of each of
256 long documents, which are drawn by shuffling the validation split as it streams in.
"""

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import safetensors
import safetensors.numpy

from ghost_dist.amounts import shown
from ghost_dist.calibration.packing import SEPARATOR, Report, TokenArray, encode
from ghost_dist.calibration.sampling import Text, spread_tokens
from ghost_dist.durable import write_bytes
from ghost_dist.errors import CalibrationError, CorruptStoreError
from ghost_dist.progress import Advance

Tokens: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

_FORMAT = "ghost_dist token windows 1"


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of token ids and where they are from; compare them by ``fingerprint``."""

    tokens: Tokens  # int32, (num_windows, window_length), read-only
    source: str  # as the user wrote it; several are joined
    source_of: tuple[int, ...] = ()  # the number of each window's source, where there are several

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
    vocab_size: int,
    seed: int | None = None,
    special_tokens: bool = False,
    window_bos: bool = False,
    sampling: Literal["beginning", "spread"] = "beginning",
    split: str = "train",
    advance: Advance = lambda _: None,
) -> TokenWindows:
    """Cut a corpus into windows, from its beginning or at places that are spread over it.

    ``windows`` None: all whole ones, which holds the whole text in memory. ``seed`` orders the
    documents of a dataset (None keeps its order, as perplexity wants it) and places spread windows.
    ``special_tokens``: the tokenizer adds its own to every document. ``window_bos``: each window is
    BOS and ``window_length - 1`` tokens of text. ``advance``: called with more tokens of windows.
    """
    bos: int | None = tokenizer.bos_token_id if window_bos else None
    if window_bos and bos is None:
        raise CalibrationError(
            "Each window is to begin with BOS (window_bos), but the tokenizer has no BOS token. "
            "Set calibration.window_bos=false."
        )
    text_length = window_length - (0 if bos is None else 1)
    needed = None if windows is None else windows * text_length
    text = Text(source, tokenizer, seed, special_tokens, split)
    report = _in_steps((windows or 0) * window_length, advance)
    if sampling == "spread":
        assert windows is not None
        stream = spread_tokens(text, windows=windows, window_length=text_length, report=report)
    else:
        with text.opened() as (corpus, pieces):
            stream = text.pack(corpus, pieces, needed=needed, report=report)
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
    report(1.0)
    return _checked(rows, source, tokenizer, vocab_size)


def _in_steps(total: int, advance: Advance) -> Report:
    """What tells of a share of the total in at most a hundred steps, which never go back."""
    told = 0

    def report(share: float) -> None:
        nonlocal told
        done = total * int(100 * min(share, 1.0)) // 100
        if done > told:
            advance(done - told)
            told = done

    return report


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
                    f"{path} holds {shown(metadata.get('format'))}, expected {_FORMAT!r}. {remedy}"
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


def _checked(tokens: TokenArray, source: str, tokenizer: Any, vocab_size: int) -> TokenWindows:
    """Windows of these tokens; CalibrationError if one has no row in the model's embedding."""
    outside = tokens[(tokens >= vocab_size) | (tokens < 0)]
    if outside.size:
        raise CalibrationError(
            f"The tokenizer does not match the model: it gives token id {outside[0]}, and the "
            f"model has {vocab_size} embeddings (ids 0 to {vocab_size - 1}); the tokenizer has "
            f"{len(tokenizer)} tokens. Use the tokenizer that belongs to the model."
        )
    return TokenWindows(tokens.astype(np.int32), source)


_C4_WINDOWS = 256
_SHUFFLE_BUFFER = 10_000
_SEED = 0


@dataclass(frozen=True)
class PublishedText:
    """Where a text is, as ``datasets.load_dataset`` takes it."""

    name: str
    config: str | None
    split: str
    column: str
    sampled: bool = False  # windows are drawn from long documents, not cut from all of the text
    options: Mapping[str, Any] = field(default_factory=dict)


PUBLISHED = {
    "wikitext2": PublishedText("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    # The published code runs the data set's own script, which datasets 4 refuses; these are the
    # hub's files made from it.
    "ptb": PublishedText(
        "parquet",
        None,
        "validation",
        "sentence",
        options={
            "data_files": {
                "validation": "hf://datasets/ptb-text-only/ptb_text_only@~parquet/"
                "penn_treebank/validation/*.parquet"
            }
        },
    ),
    "c4": PublishedText("allenai/c4", "en", "validation", "text", sampled=True),
}


def published_windows(
    text: PublishedText, tokenizer: Any, *, windows: int | None, window_length: int, vocab_size: int
) -> TokenWindows:
    """The first windows of one of :data:`PUBLISHED`; None: all of them, of C4 256."""
    tried = f"dataset {text.name}, config {text.config or '(default)'}, split {text.split}"
    try:
        import datasets

        rows = datasets.load_dataset(
            text.name, text.config, split=text.split, streaming=text.sampled, **text.options
        )
        if text.sampled:
            rows = rows.shuffle(seed=_SEED, buffer_size=_SHUFFLE_BUFFER)
            drawn = _sampled((row[text.column] for row in rows), tokenizer, window_length)
            found = list(itertools.islice(drawn, min(windows or _C4_WINDOWS, _C4_WINDOWS)))
        else:
            stream = encode(tokenizer, SEPARATOR.join(rows[text.column]), special_tokens=True)
            whole = len(stream) // window_length * window_length
            found = list(stream[:whole].reshape(-1, window_length))[:windows]
    except Exception as error:  # hub, network, file formats: each library has its own exceptions
        raise CalibrationError(
            f"Cannot read {tried}: {type(error).__name__}: {str(error).rstrip('.')}. Without "
            "network, give a local file in evaluation.corpora instead."
        ) from error
    wanted = windows or (_C4_WINDOWS if text.sampled else 1)
    if len(found) < wanted:
        raise CalibrationError(
            f"The {tried} gives {len(found)} windows of {window_length} tokens, {wanted} are "
            "wanted. Set evaluation.windows or evaluation.window_length lower."
        )
    return _checked(np.stack(found), tried, tokenizer, vocab_size)


def _sampled(rows: Iterable[str], tokenizer: Any, window_length: int) -> Iterator[TokenArray]:
    """A window from a random place of each document that is longer than one."""
    generator = random.Random(_SEED)
    for row in rows:
        tokens = encode(tokenizer, row, special_tokens=True)
        if len(tokens) > window_length:
            start = generator.randint(0, len(tokens) - window_length - 1)
            yield tokens[start : start + window_length]
