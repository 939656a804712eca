"""What a document is: a text, or a chat that the tokenizer's own template turns into one.

Files are read progressively, in their order. ``.txt`` is one document and comes in pieces;
``.jsonl`` (or ``.json`` with one object a line) and ``.parquet`` hold a document a row, in one
column. All but parquet may be gzipped. A file that is one JSON array is read whole.
"""

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from ghost_dist.amounts import shown
from ghost_dist.errors import CalibrationError

Chat: TypeAlias = list[dict[str, Any]]
Document: TypeAlias = str | Chat

COLUMNS = ("text", "content", "messages", "conversations")
"""Columns that are recognised without being named, the first one present wins."""

# ShareGPT rows say "from" and "value" where chat templates expect "role" and "content".
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant"}


def pick_column(columns: Iterable[str], wanted: str | None, where: str) -> str:
    """Name of the column that holds the document; ``wanted`` None: the first known one."""
    found = list(columns)
    for name in (wanted,) if wanted is not None else COLUMNS:
        if name in found:
            return name
    expected = f"no column {wanted!r}" if wanted is not None else f"none of {', '.join(COLUMNS)}"
    raise CalibrationError(
        f"{where} has {expected}; its columns are {', '.join(found) or '(none)'}. Name the column "
        "that holds the text after a colon: FILE:COLUMN, or DATASET:CONFIG:SPLIT:COLUMN."
    )


def as_document(value: Any, where: str) -> Document | None:
    """The cell of a row as a document, of a list of parts their text; None if the cell is null."""
    if value is None:
        return None
    if isinstance(value, str):
        _check_unicode(value, where)
        return value
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        if all("type" in item and "role" not in item for item in value):
            return as_document(_joined_parts(value, where), where)
        return [dict(item) for item in value]
    raise CalibrationError(
        f"{where} holds {type(value).__name__} {str(value)[:60]!r}; expected a text, or a chat as "
        "a list of messages. Name another column, or leave this row out."
    )


def render_chat(tokenizer: Any, chat: Chat, where: str) -> str:
    """The text of a chat by the tokenizer's chat template, special tokens written out in it."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"{where} is a chat, and this tokenizer has no chat template. Take a text corpus, or "
            "the tokenizer of the instruction-tuned model."
        )
    messages = [_message(item, where) for item in chat]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # the template is a program of the model's author
        raise CalibrationError(
            f"{where}: the tokenizer's chat template refuses the messages "
            f"({type(error).__name__}: {error}). Their roles are "
            f"{', '.join(str(message.get('role')) for message in messages[:8])}."
        ) from error
    _check_unicode(text, where)
    return text


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One message with the keys of chat templates and its content as one text.

    Null entries, which parquet adds, are gone. Templates that handle content as text (most of those
    without images) would write a list of parts as Python does.
    """
    message = {key: value for key, value in item.items() if value is not None}
    if "from" in message and "role" not in message:
        speaker = message.pop("from")
        if speaker not in _SHAREGPT_ROLES:
            raise CalibrationError(
                f"{where} has a message from {shown(speaker)}; expected one of "
                f"{', '.join(_SHAREGPT_ROLES)}. Rename it, or leave this row out."
            )
        message = {"role": _SHAREGPT_ROLES[speaker], "content": message.pop("value", "")} | message
    if isinstance(content := message.get("content"), list):
        message["content"] = _joined_parts(content, where)
    return message


def _joined_parts(parts: list[Any], where: str) -> str:
    texts = []
    for part in parts:
        text = (
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        )
        if not isinstance(text, str):
            raise CalibrationError(
                f"{where} has a part {str(part)[:60]!r} in a message; only parts of text, "
                '{"type": "text", "text": "..."}, can be read. Leave this row out.'
            )
        texts.append(text)
    return "".join(texts)


def _check_unicode(text: str, where: str) -> None:
    # JSON may hold "\\ud800" alone: a str in Python, but no text that a tokenizer can read.
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where} holds half of a surrogate pair (character {error.start}), which is not valid "
            "Unicode. Repair the row, or leave it out."
        ) from error


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
