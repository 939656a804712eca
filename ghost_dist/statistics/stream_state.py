"""What a layer-by-layer run has to keep to go on after a kill: streams at a layer boundary.

    state.json          boundary, windows, and every array with its hash; replaced as a whole
    arrays/<id>         Zarr arrays, one for each kept stream; none counts before it is named there

A thread writes while the next layers run, for a tenth of the time at most. So a resume repeats at
most the layers that ran in ten times as long as writing takes.
"""

import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghost_dist.devices import Event, arrived, mark, on_stream, side_stream
from ghost_dist.durable import fsync_folder, fsync_tree, read_sealed, write_sealed
from ghost_dist.errors import CorruptStoreError
from ghost_dist.statistics.arrays import read_array, write_array

_PARTS = 4
"""Parts of an array that are hashed and written at the same time."""
_REST = 9
"""Times as long as a save took that none is begun."""


@dataclass(frozen=True)
class Saved:
    boundary: int  # the layer that the streams enter
    streams_WTC: Tensor  # on the CPU
    rows: Mapping[str, Tensor]  # kept streams by name, on the CPU


class StreamState:
    """State of a run of ``windows`` or more; one of fewer or another ``fingerprint`` is removed."""

    def __init__(self, folder: Path, fingerprint: str, windows: Sequence[int]) -> None:
        self.folder, self._fingerprint = folder, fingerprint
        self._arrays = folder / "arrays"
        self._manifest = folder / "state.json"
        self._rows: dict[str, Any] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="stream-state")
        self._parts = ThreadPoolExecutor(_PARTS, thread_name_prefix="stream-part")
        self._pending: dict[str, tuple[Tensor, Event | None]] = {}
        self._job: Future[None] | None = None
        self._rested = 0.0
        found = self._read_manifest()
        if found is not None and set(windows) <= set(found["windows"]):
            self.windows = tuple(found["windows"])
        else:
            self.windows = tuple(windows)
            shutil.rmtree(folder, ignore_errors=True)
        self._arrays.mkdir(parents=True, exist_ok=True)

    def load(self) -> Saved | None:
        """The newest state that is whole; after a CorruptStoreError the folder may be removed."""
        manifest = self._read_manifest()
        if manifest is None:
            return None
        self._rows = dict(manifest["rows"])
        self._sweep(manifest)
        rows = {name: self._read(entry) for name, entry in self._rows.items()}
        kept = rows.get(manifest["streams"]) if isinstance(manifest["streams"], str) else None
        streams = self._read(manifest["streams"]) if kept is None else kept.clone()
        return Saved(manifest["boundary"], streams, rows)

    def keep(self, name: str, tensor: Tensor, behind: Event | None) -> None:
        """Let the next save write a final tensor, which the device of the mark ``behind`` fills."""
        self._pending[name] = tensor, behind

    def save(self, boundary: int, snapshot: Callable[[], Tensor] | str) -> bool:
        """Note that all layers below ``boundary`` are done; False if it was skipped.

        ``snapshot`` gives a copy of the streams entering it, or is the name they are kept under.
        Streams on the CPU must have come there. An earlier save's error is raised here.
        """
        if self._job is not None and not self._job.done():
            return False
        self.wait()
        began = time.monotonic()
        if began < self._rested:
            return False
        pending, self._pending = self._pending, {}
        tensor = None if isinstance(snapshot, str) else snapshot()
        behind = None if tensor is None else mark(tensor.device)

        def work() -> None:
            for name, row in pending.items():
                self._rows[name] = self._write(*row)
            streams = snapshot if tensor is None else self._write(tensor, behind)
            manifest = {
                "fingerprint": self._fingerprint,
                "windows": list(self.windows),
                "boundary": boundary,
                "streams": streams,
                "rows": self._rows,
            }
            fsync_tree(self._arrays)
            write_sealed(self._manifest, manifest)
            fsync_folder(self.folder)
            self._sweep(manifest)
            now = time.monotonic()
            self._rested = now + _REST * (now - began)

        self._job = self._writer.submit(work)
        return True

    def wait(self) -> None:
        """Until what is being saved is on the disk; its error is raised here."""
        if self._job is not None:
            self._job.result()

    def close(self) -> None:
        """End the threads; what is being written is finished."""
        self._writer.shutdown(cancel_futures=True)
        self._parts.shutdown(cancel_futures=True)

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, tensor: Tensor, behind: Event | None) -> dict[str, Any]:
        """Write one tensor in parts along its first dimension; returns its entry."""
        values = _as_numpy(tensor, behind)
        identity = uuid.uuid4().hex
        pieces = np.array_split(values, min(_PARTS, len(values)))
        paths = [self._arrays / f"{identity}-{number}" for number in range(len(pieces))]
        parts = list(self._parts.map(write_array, paths, pieces))
        dtype = str(tensor.dtype).removeprefix("torch.")
        return {"id": identity, "dtype": dtype, "parts": parts}

    def _read(self, entry: Mapping[str, Any]) -> Tensor:
        paths = [self._arrays / f"{entry['id']}-{n}" for n in range(len(entry["parts"]))]
        try:
            parts = list(self._parts.map(read_array, paths, entry["parts"]))
        except CorruptStoreError as error:
            raise CorruptStoreError(f"The saved streams in {self.folder}: {error}.") from error
        values = torch.from_numpy(np.concatenate(parts))
        dtype: torch.dtype = getattr(torch, entry["dtype"])
        return values.view(dtype)

    def _read_manifest(self) -> dict[str, Any] | None:
        manifest = read_sealed(self._manifest)
        same = manifest is not None and manifest["fingerprint"] == self._fingerprint
        return manifest if same else None

    def _sweep(self, manifest: Mapping[str, Any]) -> None:
        named = [*manifest["rows"].values(), manifest["streams"]]
        used = {entry["id"] for entry in named if isinstance(entry, dict)}
        for path in self._arrays.iterdir():
            if path.name.partition("-")[0] not in used:
                shutil.rmtree(path, ignore_errors=True)


def _as_numpy(tensor: Tensor, behind: Event | None) -> np.ndarray[Any, Any]:
    arrived(behind)
    if tensor.is_cuda:
        with on_stream(side_stream(tensor.device)):  # not behind what the device computes by now
            tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)  # numpy has no bfloat16
    return tensor.numpy()
