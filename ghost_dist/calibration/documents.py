"""What a document is: a text, or a chat that the tokenizer's own template turns into one.

A row of a JSONL file, a parquet file or a dataset holds its document in one column. Which one is
found here, the same way for every kind of source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

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
    """The cell of a row as a document; None if the cell is null.

    A list of parts, as chat messages have them, is the text of its parts.
    """
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
    """The text of a chat by the tokenizer's chat template, special tokens written out in it.

    Messages are ``{"role", "content"}``; ``{"from", "value"}`` of ShareGPT is translated.
    """
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
                f"{where} has a message from {speaker!r}; expected one of "
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
