"""The stream is that of the whole text, however little of the text was looked at."""

import itertools
import logging

import numpy as np
import pytest

from ghost_dist.calibration.corpora import Corpus
from ghost_dist.calibration.packing import pack_tokens
from ghost_dist.calibration.windows import _in_steps

KINDS = ["byte_level", "whole_text", "digits_from_right"]


def one_text(text, piece=1000):
    pieces = (text[i : i + piece] for i in range(0, len(text), piece))
    return Corpus("a.txt", pieces, one_text=True)


def several(documents):
    return Corpus("a.jsonl", iter(documents), one_text=False)


def ids(tokenizer, text, special=False):
    return tokenizer(text, add_special_tokens=special)["input_ids"]


class Counting:
    """A tokenizer that counts the characters given to it."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.characters = []

    def __call__(self, text, **options):
        self.characters.append(len(text))
        return self.tokenizer(text, **options)


# One text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("least_growth", [64, 1000, 1 << 14])
def test_prefixes_give_the_stream_of_the_whole_text(tokenizers_by_kind, text, kind, least_growth):
    tokenizer = tokenizers_by_kind[kind]
    whole = ids(tokenizer, text)
    for needed in (1, 100, 997, 5000, len(whole) - 1, len(whole), len(whole) + 1):
        corpus = one_text(text, piece=613)
        stream = pack_tokens(
            corpus, tokenizer, needed=needed, special_tokens=False, least_growth=least_growth
        )
        assert stream.tolist() == whole[:needed]


@pytest.mark.parametrize("needed", range(105, 225, 5))
def test_text_whose_end_changes_its_beginning(tokenizers_by_kind, needed):
    # The 1000 digits, characters 900 to 1900, are grouped from their right end. The first prefix
    # stops inside of them with all tokens that are needed, most often with the wrong ones.
    tokenizer = tokenizers_by_kind["digits_from_right"]
    text = " argument" * 100 + "1234567890" * 100 + " and then" * 2000
    stream = pack_tokens(
        one_text(text), tokenizer, needed=needed, special_tokens=False, least_growth=1000
    )
    assert stream.tolist() == ids(tokenizer, text)[:needed]


def test_pieces_do_not_matter(tokenizers_by_kind, text):
    tokenizer = tokenizers_by_kind["byte_level"]
    streams = [
        pack_tokens(one_text(text, piece), tokenizer, needed=2000, special_tokens=False).tolist()
        for piece in (17, 1000, len(text))
    ]
    assert streams[0] == streams[1] == streams[2]


def test_none_is_the_whole_text(tokenizers_by_kind, text):
    tokenizer = tokenizers_by_kind["byte_level"]
    stream = pack_tokens(one_text(text), tokenizer, needed=None, special_tokens=False)
    assert stream.tolist() == ids(tokenizer, text)
    assert stream.dtype == np.int64


def test_work_is_in_proportion_to_what_is_needed(tokenizers_by_kind, text):
    tokenizer = Counting(tokenizers_by_kind["byte_level"])
    endless = Corpus("", itertools.cycle([text]), one_text=True)
    stream = pack_tokens(endless, tokenizer, needed=40_000, special_tokens=False)
    used = len(tokenizer.tokenizer.decode(stream))
    assert sum(tokenizer.characters) < 6 * used


def test_dense_text_grows_geometrically(tokenizers_by_kind):
    # One token per character and less, where four characters a token were guessed.
    tokenizer = Counting(tokenizers_by_kind["byte_level"])
    pieces = itertools.cycle(["語🚀ß"])
    stream = pack_tokens(Corpus("", pieces, True), tokenizer, needed=50_000, special_tokens=False)
    assert len(stream) == 50_000
    assert len(tokenizer.characters) <= 4
    # And sparse text: long runs that are few tokens, so that the first guess is far too small.
    tokenizer = Counting(tokenizers_by_kind["byte_level"])
    pieces = itertools.cycle([" " * 5000 + "\n"])
    stream = pack_tokens(Corpus("", pieces, True), tokenizer, needed=20_000, special_tokens=False)
    assert len(stream) == 20_000
    assert sum(tokenizer.characters) < 8 * tokenizer.characters[-1]


# Documents


def test_documents_are_joined_by_a_blank_line(tokenizer, text):
    documents = [text[:500], "", " \n", text[500:900], "\n", text[900:4000]]
    stream = pack_tokens(several(documents), tokenizer, needed=None, special_tokens=False)
    assert stream.tolist() == ids(tokenizer, "\n\n".join(documents))
    part = pack_tokens(several(documents), tokenizer, needed=300, special_tokens=False)
    assert part.tolist() == stream[:300].tolist()


def test_special_tokens_are_added_to_each_document(tokenizer, text):
    documents = [text[:500], "", text[500:900], text[900:4000]]
    stream = pack_tokens(several(documents), tokenizer, needed=None, special_tokens=True)
    expected = [i for d in documents if d for i in ids(tokenizer, d, special=True)]
    assert stream.tolist() == expected
    assert stream.tolist().count(0) == 3
    part = pack_tokens(several(documents), tokenizer, needed=300, special_tokens=True)
    assert part.tolist() == expected[:300]


@pytest.mark.parametrize("special_tokens", [False, True])
def test_documents_are_read_only_as_far_as_needed(tokenizer, text, special_tokens):
    endless = itertools.cycle([text[:500], text[500:900]])
    stream = pack_tokens(several(endless), tokenizer, needed=3000, special_tokens=special_tokens)
    assert len(stream) == 3000


def test_a_text_file_with_special_tokens_is_one_document(tokenizer, text):
    whole = ids(tokenizer, text, special=True)
    for needed in (1, 500, None):
        stream = pack_tokens(one_text(text), tokenizer, needed=needed, special_tokens=True)
        assert stream.tolist() == whole[:needed]
    assert whole[0] == 0
    assert whole[-1] == 1


@pytest.mark.parametrize("special_tokens", [False, True])
def test_chats_have_the_special_tokens_of_their_template_only(tokenizer, special_tokens):
    chats = [[{"role": "user", "content": word}] for word in ("one", "two")]
    stream = pack_tokens(several(chats), tokenizer, needed=None, special_tokens=special_tokens)
    assert stream.tolist() == ids(tokenizer, "<bos>user: one<eos><bos>user: two<eos>")
    assert stream.tolist().count(0) == 2


# What the caller sees meanwhile


@pytest.mark.parametrize("special_tokens", [False, True])
def test_progress_rises_to_what_is_needed(tokenizer, text, special_tokens):
    steps = []
    documents = [text[i : i + 400] for i in range(0, 40_000, 400)]
    pack_tokens(
        several(documents),
        tokenizer,
        needed=4000,
        special_tokens=special_tokens,
        report=_in_steps(4000, steps.append),
        least_growth=100,
    )
    assert min(steps) > 0
    assert 5 < len(steps) <= 100
    assert sum(steps) == 4000


def test_text_longer_than_the_context_is_no_warning(tokenizer, text, caplog):
    tokenizer.model_max_length = 16
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    try:
        pack_tokens(one_text(text), tokenizer, needed=None, special_tokens=False)
        assert not caplog.records
        tokenizer(text)  # says it, so the check above could have failed
        assert caplog.records
    finally:
        log.removeHandler(caplog.handler)
