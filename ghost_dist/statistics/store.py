"""Statistics on disk: every window range counted exactly once, whatever died on the way.

Layout below ``RUN/statistics.zarr``::

    ledger/plan.json                 what is counted: created once, never changed
    ledger/00003.json                commit manifest of range 3: created once, last
    ranges/00003/<attempt>/<block>/<entry>/cross_ZC ... Zarr arrays of one attempt
    ranges/00003/<attempt>/0/<entry>/gram_ZZ/0 ...      strips of a symmetric one that is whole
    ranges/00003/<attempt>/<block>/packed               small arrays, one behind the other

A range is written under a fresh attempt id, fsynced, and committed by one create-only manifest that
holds every array's XXH3. Only manifests are believed, and the first one of a range wins; why that
gives bitwise the same sums is in docs/design.md.

Where the ranks of a tensor-parallel replica share a range, each writes its block of columns and one
process, which need not be one of them, commits all blocks of the attempt.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ghost_dist.durable import (
    create_bytes,
    fingerprint,
    fsync_folder,
    fsync_tree,
    json_bytes,
    sweep_partial,
    write_sealed,
)
from ghost_dist.errors import CorruptStoreError
from ghost_dist.statistics.arrays import read_array, write_array
from ghost_dist.statistics.layer_scores import ScoreSums
from ghost_dist.statistics.moments import Moments
from ghost_dist.statistics.store_plan import StatisticsPlan, check_same_plan, plan_path, stored_plan
from ghost_dist.statistics.sums import WHOLE, ColumnBlock, Sums

CPU = torch.device("cpu")
_THREADS = 8
"""Arrays that are written, or read, at a time: hashes and checksums take longer than the disk."""
PACKED = "packed"
PACKED_BYTES = 1 << 20
"""Float64 arrays below this share one: a file costs more to make and to remove than to fill."""

KINDS: Mapping[str, type[Sums]] = {
    "moments": Moments,
    "scores": ScoreSums,
}


@dataclass(frozen=True)
class WrittenBlock:
    """What one rank wrote of an attempt, as it goes into the manifest."""

    num_tokens: Mapping[str, int]  # by entry
    arrays: Mapping[str, Mapping[str, Any]]
    """Shape, dtype and XXH3 by entry/array; of a packed one where it begins, ``at``, instead."""


class StatisticsStore:
    """The Zarr store and its ledger under one folder; created if absent.

    A folder without a plan holds nothing: the making or the removal of a store was stopped there.
    Where the plan is damaged it is written anew: every range is judged by its own manifest.
    """

    def __init__(self, path: Path, plan: StatisticsPlan) -> None:
        self.path, self.plan = path, plan
        self._ledger = path / "ledger"
        self.plan_fingerprint = plan.fingerprint
        found = stored_plan(path)
        if found is not None:
            check_same_plan(path, found, plan)
            return
        if not plan_path(path).exists():
            remove_store(path)
        self._ledger.mkdir(parents=True, exist_ok=True)
        fsync_folder(path.parent)
        fsync_folder(path)
        write_sealed(plan_path(path), plan.tree())

    @staticmethod
    def open(path: Path) -> StatisticsStore:
        """Open what is there, by its own plan; writes nothing."""
        plan = stored_plan(path)
        if plan is None or not KINDS.keys() >= {*plan.entries.values()}:
            raise CorruptStoreError(
                f"{plan_path(path)} is absent, damaged, or of another version: recover writes it "
                "anew and keeps the ranges that are of its run."
            )
        return StatisticsStore(path, plan)

    def committed(self) -> tuple[int, ...]:
        """Ids of the ranges that have a manifest, ascending; hashes are not checked here."""
        return tuple(i for i in range(len(self.plan.ranges)) if self._manifest_path(i).exists())

    def missing(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.plan.ranges)) if not self._has_range(i))

    def commit(self, range_id: int, sums: Mapping[str, Sums]) -> bool:
        """Write one attempt at a range and commit it; False if another attempt was first."""
        attempt = uuid.uuid4().hex
        return self.commit_attempt(range_id, attempt, [self.write_block(range_id, attempt, sums)])

    def write_block(
        self,
        range_id: int,
        attempt: str,
        sums: Mapping[str, Sums],
        block: ColumnBlock = WHOLE,
    ) -> WrittenBlock:
        """Write one rank's columns of an attempt; nothing counts before it is committed.

        The attempt's id is new for every lease, and the same on all ranks of the replica. ``sums``
        has all columns of small arrays, which are written with the first block only.
        """
        folder = self._attempt_folder(range_id, attempt) / str(block.index)
        wanted = {
            f"{entry}/{name}": tensor
            for entry in self.plan.entries
            for name, tensor in sums[entry].parts(block).items()
        }
        packed: dict[str, Mapping[str, Any]] = {}
        small: list[torch.Tensor] = []
        at = 0
        for key, tensor in list(wanted.items()):
            if tensor.dtype == torch.float64 and tensor.nbytes < PACKED_BYTES:
                packed[key] = {"shape": list(tensor.shape), "dtype": "float64", "at": at}
                at += tensor.numel()
                small.append(wanted.pop(key).reshape(-1))
        if small:
            wanted[PACKED] = torch.cat(small)

        def write(key: str) -> Mapping[str, Any]:
            return write_array(folder / key, wanted[key].cpu().numpy())

        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                arrays = dict(zip(wanted, pool.map(write, wanted), strict=True))
            if folder.exists():
                fsync_tree(folder)
        except Exception:
            # Not when the process is stopped: threads of Zarr may still write there, and the next
            # run sweeps it away.
            self.discard_attempt(range_id, attempt)
            raise
        num_tokens = {entry: sums[entry].num_tokens for entry in self.plan.entries}
        return WrittenBlock(num_tokens, {**packed, **arrays})

    def commit_attempt(self, range_id: int, attempt: str, blocks: Sequence[WrittenBlock]) -> bool:
        """Commit an attempt whose blocks are all written; False if another attempt was first."""
        assert len(blocks) == self.plan.blocks, "all ranks write a block of every attempt"
        folder = self._attempt_folder(range_id, attempt)
        try:
            for parent in (folder, folder.parent, folder.parent.parent, self.path):
                fsync_folder(parent)
            body = {
                "range": range_id,
                "attempt": attempt,
                "plan": self.plan_fingerprint,
                "windows": list(self.plan.ranges[range_id]),
                "num_tokens": dict(blocks[0].num_tokens),
                "blocks": [{key: dict(a) for key, a in block.arrays.items()} for block in blocks],
            }
            assert all(block.num_tokens == blocks[0].num_tokens for block in blocks)
            manifest = json_bytes({**body, "sha256": fingerprint(body)})
            won = create_bytes(self._manifest_path(range_id), manifest)
        except Exception:
            self.discard_attempt(range_id, attempt)
            raise
        if not won:
            self.discard_attempt(range_id, attempt)
        return won

    def discard_attempt(self, range_id: int, attempt: str) -> None:
        """Remove what was written of an attempt that will not be committed."""
        shutil.rmtree(self._attempt_folder(range_id, attempt), ignore_errors=True)

    def committed_attempt(self, range_id: int) -> str:
        return str(self._read_manifest(range_id)["attempt"])

    def read(
        self,
        range_id: int,
        entries: Collection[str] | None = None,
        block: ColumnBlock | None = None,
        device: torch.device = CPU,
    ) -> dict[str, Sums]:
        """Sums of a committed range on a device, every hash checked.

        With ``block`` as one rank wrote them: that block of columns, and all small arrays. To
        another device each array goes as soon as it is read: host memory never holds the sums.
        """
        manifest = self._read_manifest(range_id)
        folder = self._attempt_folder(range_id, manifest["attempt"])
        kinds = {
            entry: KINDS[kind]
            for entry, kind in self.plan.entries.items()
            if entries is None or entry in entries
        }

        def asked(kind: type[Sums], number: int, name: str) -> bool:
            return block is None or number == block.index or name not in kind.BY_COLUMNS

        wanted = {
            (entry, number, name): expected
            for entry, kind in kinds.items()
            for number, arrays in enumerate(manifest["blocks"])
            for key, expected in arrays.items()
            if key.startswith(f"{entry}/")
            and asked(kind, number, name := key.removeprefix(f"{entry}/"))
        }

        def read_whole(number: int, key: str, expected: Mapping[str, Any]) -> torch.Tensor:
            path = folder / str(number) / key
            try:
                return torch.from_numpy(read_array(path, expected))
            except CorruptStoreError as error:
                where = f"{path.relative_to(self.path)} of range {range_id}"
                message = f"{where} {error}. Re-run this range."
                raise CorruptStoreError(message, (range_id,)) from error

        numbers = {number for (_, number, _), expected in wanted.items() if "at" in expected}
        packed = {n: read_whole(n, PACKED, manifest["blocks"][n][PACKED]) for n in numbers}

        def read(place: tuple[str, int, str]) -> torch.Tensor:
            (entry, number, name), expected = place, wanted[place]
            if "at" in expected:
                part = packed[number][expected["at"] :][: math.prod(expected["shape"])]
                return part.reshape(expected["shape"]).to(device)
            return read_whole(number, f"{entry}/{name}", expected).to(device)

        with ThreadPoolExecutor(_THREADS) as pool:
            arrays = dict(zip(wanted, pool.map(read, wanted), strict=True))
        sums: dict[str, Sums] = {}
        for entry, kind in kinds.items():
            blocks: list[dict[str, torch.Tensor]] = [{} for _ in manifest["blocks"]]
            for place in [place for place in arrays if place[0] == entry]:
                _, number, name = place
                blocks[number if block is None else 0][name] = arrays.pop(place)
            if block is not None:
                del blocks[1:]
            try:
                sums[entry] = kind.join(manifest["num_tokens"][entry], blocks)
            except (TypeError, KeyError, ValueError) as error:
                raise CorruptStoreError(
                    f"Range {range_id} lacks arrays of {entry}: {error}.", (range_id,)
                ) from error
        return sums

    def damaged(self) -> dict[int, str]:
        """Every committed range that cannot be read as its manifest says, with the reason."""
        reasons = {}
        for range_id in self.committed():
            try:
                self.read(range_id)
            except CorruptStoreError as error:
                reasons[range_id] = str(error)
        return reasons

    def discard(self, range_id: int) -> None:
        """Take back the commit of a damaged range; its manifest is kept for inspection."""
        target = self._ledger / f"damaged-{range_id:05d}-{uuid.uuid4().hex}.json"
        self._manifest_path(range_id).rename(target)
        fsync_folder(self._ledger)

    def sweep(self) -> None:
        """Remove attempts without a manifest and temporary files, while no other process writes."""
        sweep_partial(self._ledger)
        for folder in sorted((self.path / "ranges").glob("*")):
            kept = None
            if folder.name.isdigit() and self._manifest_path(int(folder.name)).exists():
                try:
                    kept = self._read_manifest(int(folder.name))["attempt"]
                except CorruptStoreError:
                    continue  # whatever is damaged is reported and discarded, not swept away
            for attempt in sorted(folder.glob("*")):
                if attempt.name != kept:
                    # A rank of a run that died may still be writing there: what is left of it
                    # goes with the next sweep.
                    shutil.rmtree(attempt, ignore_errors=True)

    def total(
        self,
        range_ids: Sequence[int] | None = None,
        entries: Collection[str] | None = None,
        device: torch.device = CPU,
    ) -> dict[str, Sums]:
        """Sum over committed ranges in id order; all of the plan unless ids are given."""
        wanted = range(len(self.plan.ranges)) if range_ids is None else sorted(range_ids)
        absent = tuple(i for i in wanted if not self._has_range(i))
        if absent:
            raise CorruptStoreError(
                f"Ranges {list(absent)} are not committed; run calibrate again.", absent
            )
        total: dict[str, Sums] = {}
        for range_id in wanted:
            sums = self.read(range_id, entries, device=device)
            total = {name: total[name] + part if total else part for name, part in sums.items()}
        return total

    def _has_range(self, range_id: int) -> bool:
        return self._manifest_path(range_id).exists()

    def _attempt_folder(self, range_id: int, attempt: str) -> Path:
        return self.path / "ranges" / f"{range_id:05d}" / attempt

    def _manifest_path(self, range_id: int) -> Path:
        return self._ledger / f"{range_id:05d}.json"

    def _read_manifest(self, range_id: int) -> dict[str, Any]:
        path, windows = self._manifest_path(range_id), list(self.plan.ranges[range_id])
        num_tokens = dict.fromkeys(self.plan.entries, len(windows) * self.plan.window_length)
        try:
            manifest: dict[str, Any] = json.loads(path.read_bytes())
            recorded = manifest.pop("sha256", None)
            faults = [
                name
                for name, got, expected in (
                    ("hash", recorded, fingerprint(manifest)),
                    ("range", manifest.get("range"), range_id),
                    ("plan", manifest.get("plan"), self.plan_fingerprint),
                    ("windows", manifest.get("windows"), windows),
                    ("num_tokens", manifest.get("num_tokens"), num_tokens),
                    ("number of blocks", len(manifest.get("blocks", ())), self.plan.blocks),
                )
                if got != expected
            ]
            attempt = manifest.get("attempt")
            if not (isinstance(attempt, str) and attempt.isalnum()):
                faults.append("attempt")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CorruptStoreError(f"{path} cannot be read: {error}.", (range_id,)) from error
        if faults:
            raise CorruptStoreError(
                f"Manifest {path} of range {range_id} is not as it was committed: "
                f"{', '.join(faults)} differ. Re-run this range.",
                (range_id,),
            )
        return manifest


def remove_store(path: Path) -> None:
    """Remove a store; the plan goes first, so that one whose removal was stopped counts as none."""
    plan = plan_path(path)
    if plan.exists():
        plan.unlink()
        fsync_folder(plan.parent)
    shutil.rmtree(path, ignore_errors=True)
