"""Windows from evenly spaced places of a source, so that all of it is seen, however long it is.

A source is as many stretches of equal length as there are windows, and each gives one, at the same
place of every stretch; the seed decides which. So a text that is just long enough is taken whole.

Up to ``_WHOLE`` characters for each token needed, the text is tokenised whole and its stream of
tokens is cut. Of a longer text only the windows are tokenised: each is the first tokens of the text
that begins with the line behind its place. Where documents get special tokens, what is left of one
behind a place is taken for a document of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ghost_dist.calibration.corpora import Corpus, open_corpus
from ghost_dist.calibration.packing import (
    Piece,
    Report,
    TokenArray,
    pack_tokens,
    read_pieces,
)
from ghost_dist.errors import CalibrationError

# Characters for each token; four to five are usual.
_WHOLE = 24  # of all windows: so the whole is a few times them, 1.6 MB of 65,536 tokens
_ROOM = 16  # that a place leaves for its window
_LONGEST_LINE = 8  # of a window; in a longer line it begins amid the line
_LEAST_GROWTH = 1 << 12


def spread_tokens(text: Text, *, windows: int, window_length: int, report: Report) -> TokenArray:
    """Tokens of all windows, in the order of their places: at most windows * window_length.

    A source that is long is read twice, and tokenised where the windows are. A dataset of the hub,
    or one that was saved, is shuffled instead.
    """
    needed, seed = windows * window_length, text.seed
    assert seed is not None, "it decides the places"
    files = windows
    while True:
        text = replace(text, files=files)
        with text.opened() as (corpus, pieces):
            if corpus.shuffled:
                return text.pack(corpus, pieces, needed=needed, report=report)
            kept, size = _take(pieces, _WHOLE * needed)
            if size > _WHOLE * needed:
                size += sum(len(piece.text) for piece in pieces)
                break
            if corpus.complete:
                stream = text.pack(corpus, iter(kept), needed=None)
                if len(stream) < needed:
                    return stream
                places = _places(len(stream), windows, window_length, seed)
                return np.concatenate([stream[place : place + window_length] for place in places])
        files *= 4
    del kept
    try:
        places = _places(size, windows, _ROOM * window_length, seed)
        return text.windows_at(places, size, window_length, report)
    except CalibrationError:  # of the little that is left behind one of the places, perhaps
        places = [number * size // windows for number in range(windows)]
        return text.windows_at(places, size, window_length, report)


@dataclass(frozen=True)
class Text:
    source: str
    tokenizer: Any
    seed: int | None
    special_tokens: bool
    split: str
    files: int | None = None  # of a folder: in its order, so many at most; see open_corpus

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[Corpus, Iterator[Piece]]]:
        corpus = open_corpus(self.source, seed=self.seed, split=self.split, files=self.files)
        with contextlib.closing(corpus.documents):
            yield corpus, read_pieces(corpus, self.tokenizer, special_tokens=self.special_tokens)

    def pack(self, corpus: Corpus, pieces: Iterator[Piece], **options: Any) -> TokenArray:
        return pack_tokens(
            corpus, self.tokenizer, special_tokens=self.special_tokens, pieces=pieces, **options
        )

    def windows_at(
        self, places: Sequence[int], size: int, window_length: int, report: Report
    ) -> TokenArray:
        """A window behind each place, none reaching over the next; ``size`` is the last's end."""
        rows: list[TokenArray] = []
        with self.opened() as (corpus, pieces):
            numbered = itertools.groupby(_cut(pieces, places), operator.itemgetter(0))
            stretches = (stretch for number, stretch in numbered if number >= 0)
            ends = itertools.pairwise([*places, size])
            for (place, stop), stretch in zip(ends, stretches, strict=False):
                lines = _from_a_line((p for _, p in stretch), _LONGEST_LINE * window_length)
                row = self.pack(corpus, lines, needed=window_length, least_growth=_LEAST_GROWTH)
                if len(row) < window_length:
                    raise CalibrationError(
                        f"{self.source} gives {len(row)} tokens in the {stop - place:,} characters "
                        f"behind the first {place / size:.0%} of it; a window needs "
                        f"{window_length}. Take out what is not text, or set "
                        "calibration.sampling=beginning."
                    )
                rows.append(row)
                report(len(rows) / len(places))
        return np.concatenate(rows)


def _places(size: int, windows: int, room: int, seed: int) -> list[int]:
    """Where windows begin: the same place of equal stretches, ``room`` before its end at most."""
    slack = int(random.Random(seed).random() * (size - windows * room + 1))
    return [(number * size + slack) // windows for number in range(windows)]


def _take(pieces: Iterator[Piece], limit: int) -> tuple[list[Piece], int]:
    """Pieces until they have more than ``limit`` characters, and how many they have."""
    taken, size = [], 0
    for piece in pieces:
        taken.append(piece)
        size += len(piece.text)
        if size > limit:
            break
    return taken, size


def _cut(pieces: Iterator[Piece], places: Sequence[int]) -> Iterator[tuple[int, Piece]]:
    """Pieces with the number of the place that they are behind, -1 before all, cut at places."""
    ends = [*places, sys.maxsize]
    passed = number = 0
    for piece in pieces:
        text = piece.text
        while text:
            if passed == ends[number]:
                number += 1
            taken, text = text[: ends[number] - passed], text[ends[number] - passed :]
            passed += len(taken)
            yield number - 1, piece._replace(text=taken)


def _from_a_line(pieces: Iterator[Piece], longest: int) -> Iterator[Piece]:
    """Pieces from the first line, or document, on that begins in them; all if lines are longer."""
    held: list[Piece] = []
    passed = 0
    for piece in pieces:
        end = piece.text.find("\n", 0, longest - passed) + 1
        if held and piece.special:  # the next document begins here
            held = [piece]
            break
        if end:
            held = [piece._replace(text=piece.text[end:])]
            break
        held.append(piece)
        passed += len(piece.text)
        if passed >= longest:
            break
    yield from held
    yield from pieces
