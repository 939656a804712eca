import datasets
import huggingface_hub.constants
import pytest

from ghost_dist.calibration.corpora import absolute_source, open_corpus
from ghost_dist.errors import CalibrationError

ROWS = {"text": [f"row {i}" for i in range(200)], "title": [f"title {i}" for i in range(200)]}


@pytest.fixture
def rows():
    return datasets.Dataset.from_dict(ROWS)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def parquet_folder(here, rows):
    (here / "folder").mkdir()
    rows.select(range(100)).to_parquet("folder/train-0.parquet")
    rows.select(range(100, 200)).to_parquet("folder/train-1.parquet")
    rows.select(range(5)).to_parquet("folder/test-0.parquet")
    return "folder"


def texts(source, seed=None, **options):
    return list(open_corpus(source, seed=seed, **options).documents)


# Files


def test_paths_are_relative_to_the_working_directory_or_home(here, monkeypatch):
    (here / "a.txt").write_text("hello")
    monkeypatch.setenv("HOME", str(here))
    assert texts("a.txt") == texts("~/a.txt") == texts(str(here / "a.txt"))
    assert "".join(texts("a.txt")) == "hello"
    assert open_corpus("a.txt", seed=0).one_text


def test_a_column_follows_the_file_and_a_path_may_hold_colons(here):
    (here / "a:b.jsonl").write_text('{"text": "t", "x:y": "u"}\n')
    assert texts("a:b.jsonl") == ["t"]
    assert texts("a:b.jsonl:x:y") == ["u"]
    assert absolute_source("a:b.jsonl:x:y") == f"{here}/a:b.jsonl:x:y"


def test_names_that_are_no_local_files_stay(here):
    (here / "c4").mkdir()
    for source in ("c4", "c4::test", "allenai/c4:en", "none.txt"):
        assert absolute_source(source) == source


def test_plain_text_has_no_columns(here):
    (here / "a.txt").write_text("hello")
    with pytest.raises(CalibrationError, match="plain text, so it has no column 'text'"):
        open_corpus("a.txt:text", seed=0)


@pytest.mark.parametrize(
    "source", ["none.txt", "./none", "~/none", "a/b/c", "none.jsonl:text", "", ":x"]
)
def test_missing_file(here, source):
    with pytest.raises(CalibrationError, match="There is no file or folder.*working directory"):
        open_corpus(source, seed=0)


def test_unknown_ending(here):
    (here / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(CalibrationError, match=r"a\.pdf does not say how.*\.txt, .*\.parquet"):
        open_corpus("a.pdf", seed=0)


# Saved datasets and folders of data files


def test_saved_dataset(here, rows):
    rows.save_to_disk("saved")
    assert texts("saved") == ROWS["text"]
    assert texts("saved:::title") == ROWS["title"]
    assert not open_corpus("saved", seed=None).one_text
    with pytest.raises(CalibrationError, match="without splits.*not 'test'"):
        open_corpus("saved::test", seed=0)
    with pytest.raises(CalibrationError, match="no config 'en'"):
        open_corpus("saved:en", seed=0)


def test_saved_dataset_with_splits(here, rows):
    parts = {"train": rows.select(range(10)), "test": rows.select(range(10, 12))}
    datasets.DatasetDict(parts).save_to_disk("saved")
    assert len(texts("saved")) == 10
    assert texts("saved", split="test") == texts("saved::test") == ["row 10", "row 11"]
    with pytest.raises(CalibrationError, match="no split 'dev'; its splits are train, test"):
        open_corpus("saved::dev", seed=0)


def test_folder_of_parquet_files_is_streamed(parquet_folder):
    assert texts("folder") == ROWS["text"]
    assert texts("folder::test:title") == ROWS["title"][:5]
    with pytest.raises(CalibrationError, match="Cannot open folder::dev.*split dev"):
        texts("folder::dev")


@pytest.mark.parametrize("saved", [True, False])
def test_the_seed_shuffles_and_repeats(parquet_folder, rows, saved, here, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # is 5 s
    if saved:
        rows.save_to_disk("folder")
        for path in here.glob("folder/*.parquet"):
            path.unlink()
    before = sorted(here.glob("folder/*"))
    orders = [texts("folder", seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != ROWS["text"]
    assert all(sorted(order) == sorted(ROWS["text"]) for order in orders)
    assert sorted(here.glob("folder/*")) == before  # nothing is cached in the user's folder


def test_missing_column_of_a_dataset(here):
    datasets.Dataset.from_dict({"body": ["x"], "url": ["y"]}).save_to_disk("saved")
    with pytest.raises(CalibrationError, match="none of text, .*columns are body, url"):
        texts("saved")
    with pytest.raises(CalibrationError, match="no column 'text'"):
        texts("saved:::text")


def test_a_row_that_is_no_text_is_named(here):
    datasets.Dataset.from_dict({"text": [1, 2]}).save_to_disk("saved")
    with pytest.raises(CalibrationError, match="dataset saved, .*row 0, holds int '1'"):
        texts("saved")


def test_code_in_a_dataset_folder_is_not_run(here):
    (here / "scripted").mkdir()
    (here / "scripted" / "scripted.py").write_text("open('run', 'w')")
    with pytest.raises(CalibrationError, match="Cannot open scripted"):
        texts("scripted")
    assert not (here / "run").exists()


# Names


@pytest.mark.parametrize(
    ("source", "split", "expected"),
    [
        ("c4", "train", ("allenai/c4", "en", "train")),
        ("c4:validation", "train", ("allenai/c4", "en", "validation")),
        ("wikitext2", "test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("org/name", "train", ("org/name", None, "train")),
        ("org/name:part", "train", ("org/name", "part", "train")),
        ("org/name::dev", "train", ("org/name", None, "dev")),
    ],
)
def test_names_are_streamed_without_trust(here, rows, monkeypatch, source, split, expected):
    calls = []

    def load_dataset(path, name=None, **options):
        calls.append((path, name, options))
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (here / "c4").mkdir()  # the short name wins
    assert texts(source, split=split) == ROWS["text"]
    assert calls == [(*expected[:2], {"split": expected[2], "streaming": True})]


def test_too_many_parts(here):
    with pytest.raises(CalibrationError, match="too many parts; expected DATASET:CONFIG:SPLIT"):
        open_corpus("c4:train:text:more", seed=0)


def test_a_name_without_network(here, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = r"Cannot open c4 \(dataset allenai/c4, config en, split train\).*local \.txt"
    with pytest.raises(CalibrationError, match=message):
        open_corpus("c4", seed=0)


def test_a_failure_while_reading_names_the_row(here, monkeypatch):
    def broken():
        yield {"text": "fine"}
        raise ConnectionError("the network is gone")

    rows = datasets.IterableDataset.from_generator(broken)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(
        CalibrationError, match=r"failed after 1 rows: ConnectionError: the network"
    ):
        texts("org/name")
