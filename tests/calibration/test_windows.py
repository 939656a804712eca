import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from ghost_dist.calibration.windows import TokenWindows, build_windows, load_windows, save_windows
from ghost_dist.errors import CalibrationError, CorruptStoreError


@pytest.fixture
def build(tokenizer, tmp_path, text):
    (tmp_path / "a.txt").write_text(text)

    def build(source="a.txt", **options):
        settings = {
            "windows": 8,
            "window_length": 32,
            "seed": None,
            "special_tokens": False,
            "window_bos": False,
            "vocab_size": len(tokenizer),
        } | options
        return build_windows(str(tmp_path / source), tokenizer, **settings)

    return build


@pytest.fixture
def windows():
    tokens = np.arange(24, dtype=np.int32).reshape(4, 6)
    return TokenWindows(tokens, "a.txt")


# Cutting


def test_windows_are_the_stream_cut_without_gaps(build, tokenizer, text):
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    built = build()
    assert built.tokens.dtype == np.int32
    assert built.tokens.ravel().tolist() == whole[: 8 * 32]
    assert (built.num_windows, built.window_length) == (8, 32)
    every = build(windows=None)
    assert every.num_windows == len(whole) // 32
    assert every.tokens.ravel().tolist() == whole[: every.num_windows * 32]


def test_the_same_text_from_every_kind_of_file(build, tmp_path, text):
    documents = text.split("\n\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", row_group_size=5)
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(tmp_path / "saved")
    sources = ["a.txt", "a.jsonl", "a.parquet", "saved"]
    built = [build(source, windows=None) for source in sources]
    assert len({b.fingerprint for b in built}) == 1
    assert built[0].num_windows > 100


def test_window_bos(build, tokenizer, text):
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    built = build(window_bos=True)
    assert built.tokens.shape == (8, 32)
    assert (built.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert built.tokens[:, 1:].ravel().tolist() == whole[: 8 * 31]


def test_window_bos_without_bos(build, tokenizer):
    tokenizer.bos_token = None
    with pytest.raises(CalibrationError, match="no BOS token. Set calibration.window_bos=false"):
        build(window_bos=True)


def test_special_tokens_are_asked_for(build):
    assert 0 not in build().tokens
    assert build(special_tokens=True).tokens[0, 0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"windows": 8},
            r"short.txt gives 70 tokens; 256 are needed for 8 w.*, or at most 2 windows",
        ),
        ({"windows": 1, "window_length": 71}, r"70 tokens; 71 are needed .*shorter windows\.$"),
        ({"windows": None, "window_length": 71}, r"70 tokens; 71 are needed for 1 windows of 71"),
        ({"windows": 3, "window_length": 25, "window_bos": True}, r"70 tokens; 72 are needed.*BOS"),
    ],
)
def test_too_short(build, tmp_path, options, message):
    (tmp_path / "short.txt").write_text("1" * 70)
    with pytest.raises(CalibrationError, match=message):
        build("short.txt", **options)


def test_empty_text(build, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(CalibrationError, match="gives 0 tokens"):
        build("empty.txt")


def test_exactly_enough(build, tmp_path):
    (tmp_path / "short.txt").write_text("1" * 64)
    assert build("short.txt", windows=2).num_windows == 2


def test_tokenizer_of_another_model(build, tokenizer):
    largest = int(build().tokens.max())
    build(vocab_size=largest + 1)
    message = rf"gives token id {largest}, and the model has {largest} embed.* {len(tokenizer)} tok"
    with pytest.raises(CalibrationError, match=message):
        build(vocab_size=largest)


def test_bos_outside_of_the_vocabulary(build, tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<new>"})
    with pytest.raises(CalibrationError, match="does not match the model"):
        build(window_bos=True, vocab_size=tokenizer.bos_token_id)


# The hash and the file


def test_fingerprint_sees_tokens_and_shape_only(windows):
    same = TokenWindows(windows.tokens.copy(), "elsewhere.txt")
    other_shape = TokenWindows(windows.tokens.reshape(6, 4), "a.txt")
    changed = windows.tokens.copy()
    changed[2, 3] += 1
    assert same.fingerprint == windows.fingerprint
    assert other_shape.fingerprint != windows.fingerprint
    assert TokenWindows(changed, "a.txt").fingerprint != windows.fingerprint


def test_fingerprint_is_fixed(windows):
    # Committed statistics name it, so it may not change with the version of anything.
    assert windows.fingerprint.startswith("5e60ad87954edf65")


def test_tokens_cannot_be_written(windows):
    with pytest.raises(ValueError, match="read-only"):
        windows.tokens[0, 0] = 1


def test_saved_windows_come_back(tmp_path, windows):
    path = tmp_path / "tokens.safetensors"
    save_windows(path, windows)
    loaded = load_windows(path)
    assert (loaded.tokens == windows.tokens).all()
    assert (loaded.source, loaded.fingerprint) == (windows.source, windows.fingerprint)
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.safetensors"]


def test_every_flipped_bit_of_the_tokens_is_noticed(tmp_path, windows):
    path = tmp_path / "tokens.safetensors"
    save_windows(path, windows)
    whole = path.read_bytes()
    for position in range(len(whole) - windows.tokens.nbytes, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CorruptStoreError, match="is damaged: its tokens have sha256"):
            load_windows(path)


def test_damage_anywhere_is_an_error_of_ours_or_harmless(tmp_path, windows):
    path = tmp_path / "tokens.safetensors"
    save_windows(path, windows)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        try:
            loaded = load_windows(path)
        except CorruptStoreError:
            continue
        assert loaded.fingerprint == windows.fingerprint  # a letter of the source, at most


def test_torn_missing_and_foreign_files(tmp_path, windows):
    path = tmp_path / "tokens.safetensors"
    with pytest.raises(CorruptStoreError, match=r"cannot be read.*builds it anew"):
        load_windows(path)
    save_windows(path, windows)
    whole = path.read_bytes()
    for size in (0, 5, 50, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptStoreError, match="cannot be read"):
            load_windows(path)
    path.write_bytes(safetensors.numpy.save({"tokens": windows.tokens}))
    with pytest.raises(
        CorruptStoreError, match="holds null, expected 'ghost_dist token windows 1'"
    ):
        load_windows(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, windows, monkeypatch):
    path = tmp_path / "tokens.safetensors"
    save_windows(path, windows)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_windows(path, TokenWindows(windows.tokens * 2, "b.txt"))
    assert load_windows(path).fingerprint == windows.fingerprint
    assert len(list(tmp_path.iterdir())) == 1
