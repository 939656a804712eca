"""Lays the tokens of a corpus end to end: one stream, no padding, nothing between documents lost.

Without special tokens the stream is the tokenisation of one text, the documents joined by a blank
line as perplexity and GPTQ code does; with them, each document is tokenised alone and brings the
BOS and EOS that its tokenizer adds. Chats are joined as their template wrote them.

How a text is cut into tokens may depend on what follows. So the first N tokens of a long text are
taken from a growing prefix once two prefixes, the second a quarter longer, agree on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ghost_dist.calibration.corpora import Corpus
from ghost_dist.calibration.documents import render_chat

TokenArray: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Report: TypeAlias = Callable[[float], None]
"""Called with the share that is done, an estimate from the characters read; it may go back."""

SEPARATOR = "\n\n"
_CHARACTERS_PER_TOKEN = 4.0  # first guess; corrected by what the text gives
_LEAST_GROWTH = 1 << 14  # characters


class Piece(NamedTuple):
    text: str
    special: bool  # a document that is tokenised alone, with the tokenizer's special tokens


def pack_tokens(
    corpus: Corpus,
    tokenizer: Any,
    *,
    needed: int | None,
    special_tokens: bool,
    pieces: Iterator[Piece] | None = None,
    report: Report = lambda _: None,
    least_growth: int = _LEAST_GROWTH,
) -> TokenArray:
    """First ``needed`` tokens (int64) of a corpus, or of some of its ``pieces``; fewer if it ends.

    ``needed`` None: all, which holds the whole text in memory. ``least_growth`` is the smallest
    step of a prefix in characters, and does not change the result.
    """
    if pieces is None:
        pieces = read_pieces(corpus, tokenizer, special_tokens=special_tokens)
    if special_tokens and not corpus.one_text:
        return _pack_documents(pieces, tokenizer, needed, report)

    texts = (piece.text for piece in pieces)
    encode_text = partial(encode, tokenizer, special_tokens=special_tokens)
    return _first_tokens(texts, encode_text, needed, report, least_growth)


def read_pieces(corpus: Corpus, tokenizer: Any, *, special_tokens: bool) -> Iterator[Piece]:
    """The corpus as pieces of one text, or a piece a document where those get special tokens."""
    alone = special_tokens and not corpus.one_text
    for number, document in enumerate(corpus.documents):
        if not isinstance(document, str):
            where = f"Document {number} of {corpus.name}"
            yield Piece(render_chat(tokenizer, document, where), special=False)
            continue
        if number and not corpus.one_text and not alone:
            yield Piece(SEPARATOR, special=False)
        yield Piece(document, special=alone and bool(document))


def _first_tokens(
    texts: Iterator[str],
    encode_text: Callable[[str], TokenArray],
    needed: int | None,
    report: Report,
    least_growth: int,
) -> TokenArray:
    target = float("inf") if needed is None else needed * _CHARACTERS_PER_TOKEN + least_growth
    read, ended = "", False
    before: TokenArray | None = None
    while True:
        parts, size = [read], len(read)
        while size < target and not ended:
            piece = next(texts, None)
            if piece is None:
                ended = True
            else:
                parts.append(piece)
                size += len(piece)
                report(size / target)
        read = "".join(parts)
        prefix = read if size <= target else read[: int(target)]
        tokens = encode_text(prefix)
        if needed is None or ended:
            return tokens[:needed]
        if len(tokens) < needed:
            per_token = len(prefix) / max(len(tokens), 1)
            target = max(1.5 * len(prefix), 1.1 * needed * per_token) + least_growth
            continue
        if before is not None and np.array_equal(before, tokens[:needed]):
            return before
        before = tokens[:needed]
        target = 1.25 * len(prefix) + least_growth


def _pack_documents(
    pieces: Iterator[Piece], tokenizer: Any, needed: int | None, report: Report
) -> TokenArray:
    parts: list[TokenArray] = []
    count = 0
    for piece in pieces:
        if needed is not None and count >= needed:
            break
        tokens = encode(tokenizer, piece.text, piece.special)
        parts.append(tokens)
        count += len(tokens)
        report(count / needed if needed else 0.0)
    return np.concatenate([np.empty(0, np.int64), *parts])[:needed]


def encode(tokenizer: Any, text: str, special_tokens: bool) -> TokenArray:
    # verbose=False: the text is longer than the model's context by intention, so no warning.
    encoded = tokenizer(
        text,
        add_special_tokens=special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return np.asarray(encoded["input_ids"], dtype=np.int64)
