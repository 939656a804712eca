"""Documents out of local files, read progressively: a file of any size needs little memory.

``.txt`` is one document and comes in pieces; ``.jsonl`` (or ``.json`` with one object a line) and
``.parquet`` hold a document a row. All but parquet may be gzipped. Files are read in their order.
A file that is one JSON array is the exception: it is read whole.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from ghost_dist.calibration.documents import Document, as_document, pick_column
from ghost_dist.errors import CalibrationError

TEXT_SUFFIXES = (".txt", ".txt.gz")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)

_PIECE_BYTES = 1 << 16
_PARQUET_ROWS = 256


def read_text(path: Path) -> Generator[str]:
    """Yield a text file in pieces; joined they are what ``Path.read_text`` gives."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    taken = 0
    with _opened(path) as file:
        while True:
            piece = file.read(_PIECE_BYTES)
            pending = len(utf8.getstate()[0])  # bytes of a character cut by the last piece
            try:
                text = utf8.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                raise CalibrationError(
                    f"{path} is not UTF-8 text: byte {taken - pending + error.start} is "
                    f"0x{error.object[error.start]:02x} ({error.reason}). Convert the file, for "
                    "example with iconv -f latin1 -t utf-8."
                ) from error
            yield newlines.decode(text, final=not piece)
            if not piece:
                return
            taken += len(piece)


def read_rows(path: Path, column: str | None) -> Generator[Document]:
    """The documents of a JSONL or parquet file; null cells are left out."""
    rows = _parquet_rows if path.name.endswith(PARQUET_SUFFIXES) else _json_rows
    for where, value in rows(path, column):
        document = as_document(value, where)
        if document is not None:
            yield document


def _json_rows(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        started = False
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if not started and line.lstrip().startswith(b"["):
                yield from _array_items(path, column, line + file.read())
                return
            started = True
            where = f"{path}, line {number},"
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:  # not UTF-8, or not JSON
                raise CalibrationError(
                    f"{where} is not JSON: {error}. Each line must be one object, such as "
                    '{"text": "..."}.'
                ) from error
            if not isinstance(row, dict):
                raise CalibrationError(
                    f"{where} is a {type(row).__name__}; expected one object a line, such as "
                    '{"text": "..."}.'
                )
            column = pick_column(row, column, where)
            yield where, row[column]


def _array_items(path: Path, column: str | None, content: bytes) -> Iterator[tuple[str, Any]]:
    try:
        items = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise CalibrationError(
            f"{path} is not JSON: {error}. It must be an array of objects, such as "
            '[{"text": "..."}], or hold one object a line.'
        ) from error
    for number, item in enumerate(items, start=1):
        where = f"{path}, item {number},"
        if isinstance(item, dict):
            column = pick_column(item, column, where)
            item = item[column]
        yield where, item


def _parquet_rows(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with pa.parquet.ParquetFile(path) as file:
            column = pick_column(file.schema_arrow.names, column, str(path))
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
                for value in batch.column(column).to_pylist():
                    yield f"{path}, row {number},", value
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise CalibrationError(
            f"{path} cannot be read as parquet after {number} rows: {error}. Fetch the file again."
        ) from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unzipped; what goes wrong while they are read is a CalibrationError."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast("BinaryIO", file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CalibrationError(
            f"{path} is damaged or cut short: {error}. Fetch the file again."
        ) from error
    except OSError as error:
        raise CalibrationError(
            f"{path} cannot be read: {error.strerror or error}. Give a readable file."
        ) from error
