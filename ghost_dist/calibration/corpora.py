"""Where the text comes from: a local file, a local dataset folder, or a dataset of the hub.

A source is written as one of::

    FILE[:COLUMN]                          .txt, .jsonl, .json or .parquet (see documents.py)
    FOLDER[:CONFIG[:SPLIT[:COLUMN]]]       Dataset.save_to_disk, or a folder of data files
    NAME[:CONFIG[:SPLIT[:COLUMN]]]         a name for datasets.load_dataset, streamed

A part may be empty: ``NAME::test``. ``c4`` and ``wikitext2`` are short names; write ``./c4`` for a
local folder of that name. Code that a dataset carries is never run.
"""

import re
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghost_dist.calibration.documents import (
    JSON_SUFFIXES,
    PARQUET_SUFFIXES,
    TEXT_SUFFIXES,
    Document,
    as_document,
    pick_column,
    read_rows,
    read_text,
)
from ghost_dist.errors import CalibrationError

ALIASES = {"c4": "allenai/c4:en", "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1"}
"""Short names of hub datasets; a split and a column may still follow as fourth and fifth parts."""

_SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES
_SHUFFLE_BUFFER = 10_000  # documents; of C4 that is about 20 MB
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_DEFAULT_SPLIT = "train"
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes into a folder


@dataclass(frozen=True, eq=False)
class Corpus:
    name: str  # the source as the user wrote it, for messages
    documents: Generator[Document]  # in their final order
    one_text: bool  # whether they are pieces of one, to be joined without a separator
    shuffled: bool = False
    complete: bool = True  # whether no file of a folder was left out


def open_corpus(
    source: str, *, seed: int | None, split: str = _DEFAULT_SPLIT, files: int | None = None
) -> Corpus:
    """Find a source and start reading it; nothing is held beyond a buffer of documents.

    ``seed`` shuffles the documents of a dataset, of a streamed one through a buffer; None keeps
    their order. Files are always read from the beginning. ``split`` is for a source that names
    none. ``files``: of a folder with more, so many that are evenly spaced, in its order.
    """
    name, *parts = source.split(":")
    if name in ALIASES:
        parts = [*ALIASES[name].split(":"), *parts]
        return _dataset(source, parts, None, seed, split)
    if (found := _local(source)) is not None:
        path, rest = found
        if path.is_file():
            return _file(source, path, rest)
        return _dataset(source, [str(path), *rest], path, seed, split, files)
    check_there(source)
    return _dataset(source, [name, *parts], None, seed, split)


def check_there(source: str) -> None:
    """Refuse what is neither here nor named as a dataset may be; nothing is opened."""
    name = source.partition(":")[0]
    if name in ALIASES or _local(source) is not None:
        return
    if name.endswith(_SUFFIXES) or not _HUB_NAME.fullmatch(name):
        raise CalibrationError(
            f"There is no file or folder {source} (working directory {Path.cwd()}). Give an "
            "existing one, or the name of a dataset such as allenai/c4:en."
        )


def absolute_source(source: str) -> str:
    """The same source from any working directory."""
    found = None if source.partition(":")[0] in ALIASES else _local(source)
    return source if found is None else ":".join([str(found[0].absolute()), *found[1]])


def _local(source: str) -> tuple[Path, list[str]] | None:
    """A file or folder, and the parts behind it; of paths with colons the longest that exists."""
    name, *parts = source.split(":")
    for count in range(len(parts), -1, -1) if name else ():
        path = Path(":".join([name, *parts[:count]])).expanduser()
        if path.is_file() or path.is_dir():
            return path, parts[count:]
    return None


def _file(source: str, path: Path, parts: list[str]) -> Corpus:
    column = ":".join(parts) or None
    if path.name.endswith(TEXT_SUFFIXES):
        if column is not None:
            raise CalibrationError(f"{path} is plain text, so it has no column {column!r}.")
        return Corpus(source, read_text(path), one_text=True)
    if path.name.endswith(_SUFFIXES):
        return Corpus(source, read_rows(path, column), one_text=False)
    raise CalibrationError(
        f"The name of {path} does not say how to read it; known endings are {', '.join(_SUFFIXES)}."
        " Rename the file: plain text ends in .txt."
    )


def _dataset(
    source: str,
    parts: list[str],
    folder: Path | None,
    seed: int | None,
    split: str,
    files: int | None = None,
) -> Corpus:
    name, config, named_split, column, *rest = [part or None for part in parts] + [None] * 3
    if any(rest) or name is None:
        raise CalibrationError(
            f"The source {source} has too many parts; expected DATASET:CONFIG:SPLIT:COLUMN."
        )
    tried = f"dataset {name}, config {config or '(default)'}, split {named_split or split}"
    complete = True
    saved = folder is not None and any((folder / name).is_file() for name in _SAVED)
    try:
        if folder is not None and saved:
            rows, files = _load_saved(folder, config, named_split, split), None
        else:
            from ghost_dist.checkpoint.reader import cache_only_without_hub

            cache_only_without_hub()
            import datasets

            rows = datasets.load_dataset(name, config, split=named_split or split, streaming=True)
        if files is not None:
            complete = rows.num_shards <= files
            rows = rows if complete else _evenly_spaced(rows, files)
        elif seed is not None:
            # Of a saved one in memory: its indices would else be cached in the user's folder.
            how = {"keep_in_memory": True} if saved else {"buffer_size": _SHUFFLE_BUFFER}
            rows = rows.shuffle(seed=seed, **how)
    except CalibrationError:
        raise
    except Exception as error:  # hub, network, file formats: each library has its own exceptions
        raise CalibrationError(
            f"Cannot open {source} ({tried}): {_reason(error)} "
            "Check the name and the parts after the colons; without network, give a local .txt, "
            ".jsonl or .parquet file or a dataset folder instead."
        ) from error
    return Corpus(
        source,
        _documents(rows, column, tried),
        one_text=False,
        shuffled=files is None and seed is not None,
        complete=complete,
    )


def _evenly_spaced(rows: Any, files: int) -> Any:
    """Some of the files of a streamed folder, of each of which ``datasets`` makes a shard."""
    import datasets

    count = rows.num_shards
    picked = [index * count // files for index in range(files)]
    return datasets.concatenate_datasets([rows.shard(count, index) for index in picked])


def _load_saved(folder: Path, config: str | None, named_split: str | None, split: str) -> Any:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if config is not None:
        raise CalibrationError(
            f"{folder} was written by save_to_disk and has no config {config!r}; leave it empty: "
            "FOLDER::SPLIT."
        )
    if isinstance(saved, datasets.DatasetDict):
        wanted = named_split or split
        if wanted not in saved:
            raise CalibrationError(
                f"{folder} has no split {wanted!r}; its splits are {', '.join(saved)}. Name one: "
                "FOLDER::SPLIT."
            )
        return saved[wanted]
    if named_split is not None and named_split != str(saved.split):
        raise CalibrationError(
            f"{folder} holds one dataset without splits ({saved.split or 'unnamed'}), not "
            f"{named_split!r}; leave the split away."
        )
    return saved


def _documents(rows: Any, column: str | None, tried: str) -> Generator[Document]:
    """Documents of a dataset; a failure of the library or the network names the row."""
    number = 0
    try:
        if rows.column_names:  # known up front: other columns (images, say) are not decoded
            column = pick_column(rows.column_names, column, f"The {tried}")
            rows = rows.select_columns([column])
        for row in rows:
            column = pick_column(row, column, f"The {tried}")
            document = as_document(row[column], f"{tried}, row {number},")
            if document is not None:
                yield document
            number += 1
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"Reading the {tried} failed after {number} rows: {_reason(error)} "
            "Try again; without network, give a local file instead."
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).rstrip('.')}."
