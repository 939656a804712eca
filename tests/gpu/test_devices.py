"""Nothing is used before it has come: weights, rows to be saved, flags; on every GPU there is.

Each test lets the copy in question come late (``torch.cuda._sleep`` before it on its stream), so
that whatever does not wait for it finds what was there before. The calling thread's current GPU is
the first one, as in a process that never chose.
"""

import contextlib
import subprocess
import sys
import threading

import pytest
import torch

from ghost_dist import devices
from ghost_dist.checkpoint.weight_reader import WeightReader
from ghost_dist.statistics.span_sums import FlagsOnTheWay
from ghost_dist.statistics.stream_state import StreamState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
GPUS = [torch.device("cuda", number) for number in range(min(2, torch.cuda.device_count()))]
LATE = 500_000_000
"""Cycles: a third of a second."""


@pytest.fixture(params=GPUS, ids=str)
def device(request):
    """A GPU, while the first one is current; what its allocator gives has held other numbers."""
    torch.cuda.set_device(0)
    torch.cuda.empty_cache()
    wrong = [
        torch.full((size,), 255, dtype=torch.uint8, device=request.param)
        for size in (*[1 << 19] * 64, 64 << 20)
    ]
    del wrong
    torch.cuda.synchronize(request.param)
    yield request.param
    torch.cuda.synchronize(request.param)


def late(device, stream=None):
    with torch.cuda.device(device), torch.cuda.stream(stream):
        torch.cuda._sleep(LATE)


def reader_whose_copies_are_late(source, device, monkeypatch):
    reader = WeightReader(source, device, keep_cached=True)
    next_buffer = reader._next_buffer

    def slow():
        stream, buffer = next_buffer()
        late(device, stream)
        return stream, buffer

    monkeypatch.setattr(reader, "_next_buffer", slow)
    return reader


def expected_of(source, names):
    with contextlib.closing(WeightReader(source, torch.device("cpu"))) as reader:
        return reader.start(names).wait()


def test_work_waits_for_the_weights(checkpoint, device, monkeypatch):
    source = checkpoint("llama")[0]
    names = sorted(source.tensors)[:4]
    with contextlib.closing(reader_whose_copies_are_late(source, device, monkeypatch)) as reader:
        got = {name: tensor.clone() for name, tensor in reader.start(names).wait().items()}
    for name, expected in expected_of(source, names).items():
        assert got[name].device == device
        assert torch.equal(got[name].cpu(), expected), name


def test_weights_wait_for_earlier_work_on_their_memory(checkpoint, device):
    """The allocator gives memory away that queued work still writes to."""
    source = checkpoint("llama")[0]
    name = max(source.tensors, key=lambda name: source.tensors[name].nbytes)
    nbytes = source.tensors[name].nbytes
    with contextlib.closing(WeightReader(source, device, keep_cached=True)) as reader:
        reader.start([name]).wait()  # threads and buffers are there from now on
        devices.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.empty(nbytes, dtype=torch.uint8, device=device)
        address = before.data_ptr()
        late(device)
        before.fill_(1)
        del before
        [got] = reader.start([name]).wait().values()
        assert got.data_ptr() == address, "the memory was not given again"
        assert torch.equal(got.cpu(), expected_of(source, [name])[name])


def test_a_reading_that_is_given_up_leaves_its_memory_alone(checkpoint, device, monkeypatch):
    source = checkpoint("llama")[0]
    name = max(source.tensors, key=lambda name: source.tensors[name].nbytes)
    with contextlib.closing(reader_whose_copies_are_late(source, device, monkeypatch)) as reader:
        reader.start([name]).wait()
        devices.synchronize(device)
        torch.cuda.empty_cache()
        reading = reader.start([name])
        for piece in reading._pieces:
            piece.result()  # it has begun: there is nothing to cancel any more
        address = reading._tensors[name].data_ptr()
        reading.cancel()
        del reading
        after = torch.full((source.tensors[name].nbytes,), 7, dtype=torch.uint8, device=device)
        assert after.data_ptr() == address, "the memory was not given again"
        devices.synchronize(device)
        reader.close()
        devices.synchronize(device)
    assert bool((after == 7).all())


@pytest.mark.parametrize("place", ["device", "host", "snapshot"])
def test_streams_and_rows_are_saved_when_they_have_come(device, tmp_path, place):
    state = StreamState(tmp_path / "state", "same", range(4))
    values = torch.randn(4, 256, 256, device=device)
    host = place == "host"
    row = torch.zeros(values.shape, device="cpu" if host else device, pin_memory=host)
    late(device)
    row.copy_(values, non_blocking=True)
    if place == "snapshot":
        assert state.save(1, row.clone)
    else:
        state.keep("row", row, devices.mark(device))
        assert state.save(1, "row")
    state.wait()
    state.close()
    saved = StreamState(tmp_path / "state", "same", range(4)).load()
    assert torch.equal(saved.streams_WTC, values.cpu())


def test_flags_are_read_when_they_have_come(device):
    numbers = [torch.ones((), device=device) for _ in range(3)]
    late(device)
    numbers[1] *= float("nan")
    assert FlagsOnTheWay(numbers).arrived() == [True, False, True]


def test_a_side_stream_of_another_thread_belongs_to_its_gpu(device):
    found = []

    def work():
        with devices.on_stream(devices.side_stream(device)):
            found.append((torch.cuda.current_device(), torch.cuda.current_stream().device))
        found.append(torch.cuda.current_device())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(device.index, device), 0]


@pytest.mark.parametrize(
    "first",
    [
        *("reset_peak", "peak_bytes", "free_bytes", "free_or_cached_bytes", "release_cached"),
        *("mark", "synchronize", "begin"),
    ],
)
def test_anything_may_be_the_first_in_a_process(device, first):
    code = f"import torch; from ghost_dist.devices import *; device = torch.device({str(device)!r})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {first}(device)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
