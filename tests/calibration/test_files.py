import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghost_dist.calibration import documents
from ghost_dist.calibration.documents import read_rows, read_text
from ghost_dist.errors import CalibrationError


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Text files


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 1 << 16])
def test_pieces_join_to_what_python_reads(tmp_path, piece_bytes, monkeypatch):
    monkeypatch.setattr(documents, "_PIECE_BYTES", piece_bytes)
    path = tmp_path / "a.txt"
    path.write_bytes("é\r\n漢字 🙂\r\rend\r".encode() * 20)
    assert "".join(read_text(path)) == path.read_text(encoding="utf-8")


def test_gzipped_text(tmp_path, text):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert "".join(read_text(path)) == text


@pytest.mark.parametrize("piece_bytes", [1, 2, 5, 1 << 16])
@pytest.mark.parametrize(
    ("content", "byte"), [("aé漢".encode() + b"\xff b", 6), (b"abc\xe6\xbc", 3)]
)
def test_bytes_that_are_not_utf8_are_located(tmp_path, content, byte, piece_bytes, monkeypatch):
    monkeypatch.setattr(documents, "_PIECE_BYTES", piece_bytes)
    path = tmp_path / "latin.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=rf"latin\.txt is not UTF-8 text: byte {byte} is 0x"):
        list(read_text(path))


def test_damaged_gzip(tmp_path, text):
    path = tmp_path / "a.txt.gz"
    whole = gzip.compress(text.encode())
    for damaged in (whole[:-200], b"no gzip at all"):
        path.write_bytes(damaged)
        with pytest.raises(CalibrationError, match=r"a\.txt\.gz is damaged or cut short"):
            list(read_text(path))


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(CalibrationError, match=f"{tmp_path} cannot be read: Is a directory"):
        list(read_text(tmp_path))


def test_a_large_file_is_read_only_as_far_as_asked(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 200_000 + b"\xff")  # the bad byte is never reached
    assert len(next(read_text(path))) < 100_000


# Rows


def test_jsonl_and_its_gzip_give_the_same_documents(tmp_path):
    rows = [{"id": 1, "text": "eins"}, {"text": None}, {"text": ""}, {"text": "zwei\n é"}]
    plain = write_jsonl(tmp_path / "a.jsonl", rows)
    zipped = tmp_path / "a.json.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes() + b"\n"))
    expected = ["eins", "", "zwei\n é"]
    assert list(read_rows(plain, None)) == list(read_rows(zipped, None)) == expected


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_its_rows(tmp_path, indent):
    chat = [{"role": "user", "content": "hi"}]
    rows = [{"text": "eins", "id": 1}, {"text": None}, "zwei\n é", chat]
    path = tmp_path / "a.json"
    path.write_text("\n " + json.dumps(rows, indent=indent))
    zipped = tmp_path / "a.json.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_rows(path, None)) == ["eins", "zwei\n é", chat]
    assert list(read_rows(zipped, None)) == ["eins", "zwei\n é", chat]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": 7}]', r"a\.json, item 2, holds int '7'; expected a text"),
        ('[{"text": "a"}, 7]', r"a\.json, item 2, holds int '7'; expected a text"),
        ('[{"text": "a"}, ', r"a\.json is not JSON: .*an array of objects"),
    ],
)
def test_bad_items_are_named(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=message):
        list(read_rows(path, None))


def test_content_in_parts_is_its_text(tmp_path):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": parts}])
    assert list(read_rows(path, None)) == ["one two"]


def test_parquet_row_groups_in_order(tmp_path):
    path = tmp_path / "a.parquet"
    documents = [f"document {i}" for i in range(1000)]
    table = pa.table({"url": documents[::-1], "content": documents})
    pq.write_table(table, path, row_group_size=37)
    assert list(read_rows(path, None)) == documents
    assert list(read_rows(path, "url")) == documents[::-1]


def test_chats_come_as_messages(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["x"], "messages": [chat]}), path)
    assert list(read_rows(path, None)) == [chat]
    assert list(read_rows(write_jsonl(tmp_path / "a.jsonl", [{"messages": chat}]), None)) == [chat]


def test_known_columns_have_an_order(tmp_path):
    row = {"messages": [{"role": "user", "content": "hi"}], "content": "c", "text": "t"}
    assert list(read_rows(write_jsonl(tmp_path / "a.jsonl", [row]), None)) == ["t"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_missing_column_lists_those_found(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [{"body": "x", "url": "y"}])
    else:
        pq.write_table(pa.table({"body": ["x"], "url": ["y"]}), path)
    with pytest.raises(CalibrationError, match=r"none of text, .*its columns are body, url.*:COL"):
        list(read_rows(path, None))
    with pytest.raises(CalibrationError, match=r"no column 'text'; its columns are body, url"):
        list(read_rows(path, "text"))
    assert list(read_rows(path, "body")) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "unfinished', r"line 2, is not JSON"),
        (b'{"text": "\xff"}', r"line 2, is not JSON.*utf-8"),
        (b'["text"]', r"line 2, is a list; expected one object a line"),
        (b'{"other": "x"}', r"line 2, has no column 'text'; its columns are other"),
        (b'{"text": 7}', r"line 2, holds int '7'; expected a text"),
        (b'{"text": []}', r"line 2, holds list"),
        (b'{"text": "half \\ud800"}', r"line 2, holds half of a surrogate pair \(character 5\)"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(CalibrationError, match=message):
        list(read_rows(path, None))


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(
        CalibrationError, match=r"a\.parquet cannot be read as parquet after 0 rows"
    ):
        list(read_rows(path, None))
