"""Ranks that share a reading, here threads: each reads a part, all have the whole."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from block_scaled import save_in_fp8
from families import save_checkpoint

from ghost_dist.checkpoint import weight_reader
from ghost_dist.checkpoint.peers import Peers
from ghost_dist.checkpoint.reader import open_checkpoint, read_tensor
from ghost_dist.checkpoint.weight_reader import WeightReader

CPU = torch.device("cpu")


@dataclass
class Meeting:
    count: int
    barrier: threading.Barrier = None
    parts: dict = field(default_factory=dict)

    def __post_init__(self):
        self.barrier = threading.Barrier(self.count, timeout=30)


@dataclass(frozen=True)
class ThreadRank(Peers):
    """Gathers through memory that all threads see; what others were to fill is spoilt first."""

    meeting: Meeting = None

    def gather(self, memory):
        assert memory.numel() % self.count == 0
        parts = memory.view(self.count, -1)
        self.meeting.parts[self.rank] = parts[self.rank].clone()
        parts.fill_(0xA5)
        self.meeting.barrier.wait()
        for rank, part in self.meeting.parts.items():
            parts[rank] = part
        self.meeting.barrier.wait()


def read_by(count, checkpoint, groups):
    """What every rank has of every group, and the bytes that it read itself."""
    meeting = Meeting(count)

    def one(rank):
        peer = ThreadRank(rank, count, meeting)
        with contextlib.closing(WeightReader(checkpoint, CPU, peers=peer)) as reader:
            found = [reader.start(names).wait() for names in groups]
            return found, reader.bytes_read

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("block_bytes", [100, 32 << 20])
def test_every_rank_has_all_and_together_they_read_once(tmp_path, monkeypatch, count, block_bytes):
    monkeypatch.setattr(weight_reader, "BLOCK_BYTES", block_bytes)
    save_checkpoint("mixtral", tmp_path / "model", max_shard_size="100KB")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert len(checkpoint.headers) > 1
    names = sorted(checkpoint.tensors)
    groups = [names[:5], names[5:6], names[6:]]
    of_ranks = read_by(count, checkpoint, groups)
    for found, _ in of_ranks:
        for group, tensors in zip(groups, found, strict=True):
            assert sorted(tensors) == group
            for name, tensor in tensors.items():
                torch.testing.assert_close(tensor, read_tensor(checkpoint, name), rtol=0, atol=0)
    own = [nbytes for _, nbytes in of_ranks]
    assert sum(own) == checkpoint.nbytes
    # Parts are equal but for the padding of tensors to 256 bytes.
    assert max(own) - min(own) <= 256 * (len(names) + len(groups) * count)


def test_scales_of_other_ranks_count(tmp_path):
    save_checkpoint("llama", tmp_path / "model")
    assert save_in_fp8(tmp_path / "model", tmp_path / "fp8", tmp_path / "twin", (40, 28))
    stored, twin = open_checkpoint(tmp_path / "fp8"), open_checkpoint(tmp_path / "twin")
    for found, _ in read_by(3, stored, [sorted(stored.tensors)]):
        for name, tensor in found[0].items():
            torch.testing.assert_close(tensor, read_tensor(twin, name), rtol=0, atol=0)


def test_a_rank_alone_reads_only_its_part(tmp_path):
    save_checkpoint("llama", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    name = max(checkpoint.tensors, key=lambda n: checkpoint.tensors[n].nbytes)
    nbytes = checkpoint.tensors[name].nbytes
    assert nbytes % 512 == 0
    _, (_, second) = read_by(2, checkpoint, [[name]])
    assert second == nbytes // 2
