"""The group over replicas on NCCL, one GPU a rank, beside a world that a rank is in already."""

import multiprocessing
import socket

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
SIZE = 1 << 16


def _rank(number, meeting_port, world_port, results):
    import torch.distributed as dist

    from ghost_dist.cluster.running_sums import ReduceSpec, ReplicaGroup
    from ghost_dist.statistics.sums import ColumnBlock

    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    own = f"tcp://127.0.0.1:{world_port}"
    dist.init_process_group("nccl", init_method=own, rank=0, world_size=1, device_id=device)
    spec = ReduceSpec({}, (), "127.0.0.1", meeting_port, number, 2, ())
    group = ReplicaGroup(spec, ColumnBlock(), device, 60)
    values = values_of(number)
    counts = torch.tensor([1, 2 * number])
    group.add(counts)
    group.add(values)
    group.close()
    alone = torch.ones(1, device=device)
    dist.all_reduce(alone)  # the world of its own is as it was
    results.put((number, counts.tolist(), values.tolist(), float(alone)))
    dist.destroy_process_group()


def values_of(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(SIZE, generator=generator, dtype=torch.float64)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_replicas_add_on_their_gpus():
    from ghost_dist.cluster.running_sums import host_meeting

    context = multiprocessing.get_context("spawn")
    meeting, results = host_meeting("127.0.0.1", 60), context.Queue()
    ranks = [
        context.Process(target=_rank, args=(number, meeting.port, free_port(), results))
        for number in range(2)
    ]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    expected = values_of(0) + values_of(1)
    for _, counts, values, alone in found:
        assert counts == [2, 2]
        assert alone == 1
        assert torch.equal(torch.tensor(values, dtype=torch.float64), expected)
