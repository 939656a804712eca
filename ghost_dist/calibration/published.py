"""WikiText-2, PTB and C4 as the published code of arXiv 2605.15491 takes windows of them.

Each comes from the hub. WikiText-2 and PTB are all rows of one split joined by a blank line and
tokenised as one text, with whatever special tokens the tokenizer adds to a text; the stream is cut
into whole windows. C4 is one window from a random place of each of 256 long documents, which are
drawn by shuffling the validation split as it streams in.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ghost_dist.calibration.packing import SEPARATOR, TokenArray
from ghost_dist.calibration.windows import TokenWindows, check_vocabulary
from ghost_dist.errors import CalibrationError

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
    sampled: bool = False
    """Whether windows are drawn from long documents, rather than cut from all of the text."""
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
            found = list(
                itertools.islice(
                    _sampled((row[text.column] for row in rows), tokenizer, window_length),
                    min(windows or _C4_WINDOWS, _C4_WINDOWS),
                )
            )
        else:
            found = _cut(rows[text.column], tokenizer, window_length)[:windows]
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
    tokens_WT = np.stack(found)
    check_vocabulary(tokens_WT, tokenizer, vocab_size)
    return TokenWindows(tokens_WT.astype(np.int32), tried)


def _cut(rows: Iterable[str], tokenizer: Any, window_length: int) -> list[TokenArray]:
    stream = _encode(tokenizer, SEPARATOR.join(rows))
    count = len(stream) // window_length
    return list(stream[: count * window_length].reshape(count, window_length))


def _sampled(rows: Iterable[str], tokenizer: Any, window_length: int) -> Iterator[TokenArray]:
    """A window from a random place of each document that is longer than one."""
    generator = random.Random(_SEED)
    for row in rows:
        tokens = _encode(tokenizer, row)
        if len(tokens) > window_length:
            start = generator.randint(0, len(tokens) - window_length - 1)
            yield tokens[start : start + window_length]


def _encode(tokenizer: Any, text: str) -> TokenArray:
    return np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
