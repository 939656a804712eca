"""Windows come from evenly spaced places of the whole source, whatever kind it is of."""

import gzip
import json
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghost_dist.calibration import sampling
from ghost_dist.calibration.corpora import open_corpus
from ghost_dist.calibration.windows import build_windows
from ghost_dist.errors import CalibrationError

WINDOWS, LENGTH = 12, 16  # 192 tokens; a text of more than 4,608 characters is not tokenised whole


class Counting:
    """A tokenizer that counts the characters given to it."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return self.tokenizer(text, **options)

    def __len__(self):
        return len(self.tokenizer)


@pytest.fixture
def build(tokenizer, tmp_path):
    def build(source, counting=None, **options):
        settings = {
            "windows": WINDOWS,
            "window_length": LENGTH,
            "seed": 0,
            "special_tokens": False,
            "window_bos": False,
            "sampling": "spread",
            "vocab_size": len(tokenizer),
        } | options
        return build_windows(str(tmp_path / source), counting or tokenizer, **settings).tokens

    return build


@pytest.fixture
def lines():
    return [f"line {number:05} says {number * number:09}" for number in range(5000)]


@pytest.fixture
def numbers_of(tokenizer):
    """Numbers of the lines that windows begin with."""

    def numbers_of(tokens):
        return [int(tokenizer.decode(row).split()[1]) for row in tokens]

    return numbers_of


def assert_evenly_spread(numbers, count):
    stretch = count / len(numbers)
    assert [number // stretch for number in numbers] == list(range(len(numbers)))
    assert np.abs(np.diff(numbers) - stretch).max() <= 2  # places are at most a line apart


def write(folder, kind, documents):
    """A source of documents; of text, where they are joined as packing joins them."""
    path = folder / f"a.{kind}"
    whole = "".join(json.dumps({"text": d}) + "\n" for d in documents).encode()
    if kind == "txt":
        path.write_text("\n\n".join(documents))
    elif kind == "txt.gz":
        path.write_bytes(gzip.compress("\n\n".join(documents).encode()))
    elif kind == "jsonl":
        path.write_bytes(whole)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(whole))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": documents}), path, row_group_size=300)
    else:
        assert kind == "folder"
        path.mkdir()
        for number in range(0, len(documents), 1000):
            table = pa.table({"text": documents[number : number + 1000]})
            pq.write_table(table, path / f"train-{number:05}.parquet")
    return path.name


KINDS = ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet", "folder"]


def test_windows_are_spread_evenly_and_the_same_from_every_kind(build, lines, numbers_of, tmp_path):
    built = [build(write(tmp_path, kind, lines)) for kind in KINDS]
    assert built[0].shape == (WINDOWS, LENGTH)
    assert_evenly_spread(numbers_of(built[0]), len(lines))
    for kind, tokens in zip(KINDS, built, strict=True):
        assert (tokens == built[0]).all(), kind


def test_a_window_is_the_beginning_of_the_text_from_its_line_on(build, lines, tokenizer, tmp_path):
    text = "\n".join(lines)
    (tmp_path / "a.txt").write_text(text)
    for row in build("a.txt"):
        start = text.index(tokenizer.decode(row))
        assert text[start - 1] == "\n"
        whole = tokenizer(text[start:][:1000], add_special_tokens=False)["input_ids"]
        assert row.tolist() == whole[:LENGTH]


def test_the_seed_decides_the_places(build, lines, numbers_of, tmp_path):
    source = write(tmp_path, "txt", lines)
    found = {seed: numbers_of(build(source, seed=seed)) for seed in range(8)}
    assert found[3] == numbers_of(build(source, seed=3))
    firsts = [numbers[0] for numbers in found.values()]
    assert len(set(firsts)) > 5
    assert max(firsts) - min(firsts) > 0.4 * len(lines) / WINDOWS
    for numbers in found.values():
        assert_evenly_spread(numbers, len(lines))


def test_only_the_windows_are_tokenised(build, lines, tokenizer, tmp_path):
    (tmp_path / "once.txt").write_text("\n".join(lines))
    (tmp_path / "often.txt").write_text("\n".join(lines * 10))
    work = []
    for source in ("once.txt", "often.txt"):
        counting = Counting(tokenizer)
        build(source, counting)
        work.append(counting.characters)
    assert work[1] < 1.1 * work[0] < 300_000


def test_of_a_short_text_windows_are_cut_from_its_stream(build, tokenizer, text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    whole = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    count = len(whole) // 100 - 100
    tokens = build("a.txt", windows=count, window_length=100)
    at = 0
    for row in tokens:  # in order, without overlap, in even gaps
        start = next(i for i in range(at, at + 200) if (whole[i : i + 100] == row).all())
        at = start + 100
    stretch = len(whole) / count
    assert len(whole) - stretch - 100 <= start <= len(whole) - 100


@pytest.mark.parametrize("bos", [False, True])
def test_of_text_that_is_just_enough_everything_is_taken(build, text, tmp_path, bos):
    (tmp_path / "a.txt").write_text("1" * 64 * (4 - bos))
    (tmp_path / "b.txt").write_text("1" * 64 * (4 - bos) + "1")
    settings = {"windows": 64, "window_length": 4, "window_bos": bos}
    assert (build("a.txt", **settings) == build("a.txt", sampling="beginning", **settings)).all()
    build("b.txt", **settings)
    with pytest.raises(
        CalibrationError, match=r"a.txt gives .* needed for 65 .*at most 64 windows"
    ):
        build("a.txt", **{**settings, "windows": 65})


@pytest.mark.parametrize("special_tokens", [False, True])
def test_documents_longer_than_a_stretch_are_cut(
    build, lines, numbers_of, tokenizer, tmp_path, special_tokens
):
    # Three books for twelve windows.
    books = ["\n".join(lines[start : start + 1700]) for start in range(0, len(lines), 1700)]
    source = write(tmp_path, "jsonl", books)
    tokens = build(source, special_tokens=special_tokens)
    begins = tokens[:, 0] == tokenizer.bos_token_id
    assert begins.all() if special_tokens else not begins.any()
    words = [tokenizer.decode(row, skip_special_tokens=True).split()[1] for row in tokens]
    assert_evenly_spread([int(word) for word in words], len(lines))


def test_special_tokens_of_whole_documents(build, tokenizer, tmp_path):
    documents = [f"document {number} has no line break" for number in range(4000)]
    source = write(tmp_path, "jsonl", documents)
    for row in build(source, special_tokens=True, window_length=64):
        first = int(re.search(r"document (\d+)", tokenizer.decode(row))[1])
        ids = [
            i for document in documents[first : first + 9] for i in tokenizer(document).input_ids
        ]
        assert row.tolist() == ids[:64]


def test_chats_are_spread_by_what_their_template_writes(build, tokenizer, tmp_path):
    chats = [[{"role": "user", "content": f"number {n:04}"}] for n in range(4000)]
    rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (tmp_path / "a.jsonl").write_text(rows)
    for special_tokens in (False, True):
        tokens = build("a.jsonl", special_tokens=special_tokens, window_length=64)
        numbers = [int(re.search(r"number (\d{4})", tokenizer.decode(row))[1]) for row in tokens]
        assert_evenly_spread(numbers, 4000)


def test_one_line_begins_amid_a_line(build, tokenizer, tmp_path):
    text = " ".join(str(number) for number in range(20_000))
    (tmp_path / "a.txt").write_text(text)
    places = [text.index(tokenizer.decode(row)) for row in build("a.txt")]
    stretch = len(text) / WINDOWS
    assert [place // stretch for place in places] == list(range(WINDOWS))


def test_a_stretch_of_few_tokens_is_refused(build, lines, tokenizer, tmp_path):
    tokenizer.add_tokens(["=" * 64])
    (tmp_path / "a.txt").write_text("\n".join([*lines, "=" * 400_000, *lines]))
    message = r"a.txt gives \d+ tokens in the [\d,]+ characters behind the first [23]\d% of it"
    with pytest.raises(CalibrationError, match=message + ".*calibration.sampling=beginning"):
        build("a.txt", window_length=1200)
    build("a.txt", window_length=1200, sampling="beginning")


def test_a_last_window_that_does_not_fit_begins_where_its_stretch_does(
    build, lines, tokenizer, tmp_path
):
    """The end of the text is a long run that is few tokens; before it there is enough."""
    tokenizer.add_tokens(["=" * 64])
    text = "\n".join(lines[:2000])  # 52,000 characters: stretches of 4,600
    (tmp_path / "a.txt").write_text(text + "=" * 3300)
    found = set()
    for seed in range(12):
        tokens = build("a.txt", seed=seed, window_length=150)
        assert tokens.shape == (WINDOWS, 150)
        found.add(tuple(tokens[0][:8]))
    assert 1 < len(found) < 12  # some seeds had to begin with their stretches


@pytest.mark.parametrize("size", [1, 200])
def test_a_folder_of_many_files_is_read_in_evenly_spaced_ones(
    build, tokenizer, tmp_path, monkeypatch, size
):
    # Of 80 files 12 are enough for 12 windows if they are long; all are needed if they are short.
    (tmp_path / "folder").mkdir()
    for file in range(80):
        text = "".join(json.dumps({"text": f"file {file:02}"}) + "\n" for _ in range(size))
        (tmp_path / "folder" / f"train-{file:02}.jsonl").write_text(text)
    complete = set()

    def reading(*arguments, **options):
        corpus = open_corpus(*arguments, **options)
        complete.add(corpus.complete)
        return corpus

    monkeypatch.setattr(sampling, "open_corpus", reading)
    tokens = build("folder")
    files = [int(re.search(r"file (\d\d)", tokenizer.decode(row))[1]) for row in tokens]
    assert {5, 6, 7, 8}.issuperset(np.diff(files).tolist())
    assert complete == ({False} if size > 1 else {False, True})


def test_a_saved_dataset_is_shuffled_as_ever(build, lines, tmp_path):
    datasets.Dataset.from_dict({"text": lines}).save_to_disk(tmp_path / "saved")
    assert (build("saved") == build("saved", sampling="beginning")).all()
    assert not (build("saved") == build("saved", seed=1)).all()
