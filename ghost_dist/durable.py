"""Files that are either whole or absent, whatever kills the process or the machine.

A file appears under its final name only when its bytes are on the disk: written under a temporary
name in the same folder, fsynced, renamed, and the folder fsynced.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".ghost-partial"
_FSYNCS = 16


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` on a clean exit, fsynced; else it is removed."""
    with _beside(path) as temporary:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Create or replace ``path`` with indented JSON; NaN is refused."""
    write_bytes(path, json_bytes(value))


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Create or replace ``path`` with a JSON object and its own sha256."""
    write_json(path, {**value, "sha256": hashlib.sha256(json_bytes(value)).hexdigest()})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What :func:`write_sealed` wrote; None if it is absent or not as it was written."""
    try:
        tree = json.loads(path.read_bytes())
        digest = tree.pop("sha256")
        return tree if hashlib.sha256(json_bytes(tree)).hexdigest() == digest else None
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None


def create_bytes(path: Path, content: bytes) -> bool:
    """Create ``path`` only if it does not exist; True if this call created it.

    A hard link to the complete content is the atomic step: of several processes exactly one wins.
    """
    with _beside(path) as temporary:
        temporary.write_bytes(content)
        fsync_file(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        fsync_folder(path.parent)
    return True


def sweep_partial(folder: Path) -> None:
    """Remove what killed writers left in a folder that nobody writes to."""
    for pattern in (f".*{TEMPORARY_SUFFIX}", ".tmp??????"):  # the latter are of safetensors itself
        for path in folder.glob(pattern):
            if path.is_file():
                path.unlink(missing_ok=True)


def json_bytes(value: Any) -> bytes:
    """Indented JSON with a final newline; NaN and Inf raise ``ValueError``."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def fingerprint(value: Any) -> str:
    """Hex sha256 of a JSON-serialisable value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fsync_file(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    _force(os.open(path, os.O_RDONLY))


fsync_folder = fsync_file


def fsync_in(pool: Executor, path: Path) -> Future[None]:
    """Let a pool force a file to the disk, whatever name it has by then."""
    return pool.submit(_force, os.open(path, os.O_RDONLY))


def _force(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Force every file and folder below ``path``, and ``path`` itself, to the disk.

    Many at a time: a journal brings what is asked for together to the disk in one go, which for a
    hundred small arrays is ten times as fast.
    """
    paths = [Path(folder, name) for folder, _, names in os.walk(path) for name in (*names, "")]
    with ThreadPoolExecutor(_FSYNCS) as pool:
        list(pool.map(fsync_file, paths))
