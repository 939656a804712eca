"""Opening a checkpoint: what is read, and every kind of damage by name."""

import json
import shutil
import socket
import struct
import urllib.request

import pytest
import torch
from families import save_checkpoint
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from ghost_dist.checkpoint.reader import (
    INDEX,
    cache_only_without_hub,
    model_fingerprint,
    open_checkpoint,
    resolve_checkpoint,
)
from ghost_dist.errors import CheckpointError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return save_checkpoint("llama", tmp_path_factory.mktemp("reader") / "llama")


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "model")


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_header(path, change):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def test_byte_ranges_are_the_tensors(folder):
    checkpoint = open_checkpoint(folder)
    seen = 0
    for path in shards(folder):
        for name, value in load_file(path).items():
            info = checkpoint.tensors[name]
            raw = path.read_bytes()[info.offset : info.offset + info.nbytes]
            assert (info.file, info.shape) == (path.name, tuple(value.shape))
            assert raw == value.numpy().tobytes()
            seen += value.nbytes
    assert checkpoint.nbytes == seen
    assert checkpoint.dtype == torch.float32


def test_single_file_and_dtype(tmp_path):
    save_checkpoint("llama", tmp_path, dtype=torch.bfloat16, max_shard_size="1GB")
    assert [path.name for path in shards(tmp_path)] == ["model.safetensors"]
    assert open_checkpoint(tmp_path).dtype == torch.bfloat16


def test_shards_may_be_symbolic_links(folder, tmp_path):
    """As in the cache of huggingface_hub: snapshots/REVISION/NAME -> ../../blobs/HASH."""
    snapshot = tmp_path / "snapshots" / "revision"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, tmp_path / "blobs")
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert open_checkpoint(snapshot).nbytes == open_checkpoint(folder).nbytes


def test_truncated_shard(folder):
    victim = shards(folder)[3]
    content = victim.read_bytes()
    victim.write_bytes(content[:-1000])
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    assert victim.name in str(error.value)
    assert f"got {len(content) - 1000} bytes, its header says {len(content)}" in str(error.value)


@pytest.mark.parametrize("length", [0, 4, 8, 60])
def test_file_shorter_than_its_header(folder, length):
    victim = shards(folder)[0]
    victim.write_bytes(victim.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=victim.name):
        open_checkpoint(folder)


def test_missing_shard(folder):
    victim = shards(folder)[2]
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"names {victim.name}, which is not in the folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../model-x.safetensors", "/etc/model.safetensors", "..", "a/b"])
def test_index_never_leaves_the_folder(folder, name):
    (folder.parent / "model-x.safetensors").write_bytes(shards(folder)[0].read_bytes())
    edit_index(folder, lambda weights: weights.update({"model.norm.weight": name}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        open_checkpoint(folder)


def test_index_names_pickle(folder):
    edit_index(folder, lambda weights: weights.update({"model.norm.weight": "model.bin"}))
    with pytest.raises(CheckpointError, match="Pickle weights are never loaded"):
        open_checkpoint(folder)


def test_index_names_tensor_that_its_shard_lacks(folder):
    edit_index(folder, lambda weights: weights.update({"model.extra": shards(folder)[0].name}))
    with pytest.raises(CheckpointError, match=r"the first is model\.extra"):
        open_checkpoint(folder)


def _first(header):
    return next(entry for name, entry in header.items() if name != "__metadata__")


@pytest.mark.parametrize(
    "change",
    [
        lambda h: _first(h).update(shape=[3, 3]),
        lambda h: _first(h).update(dtype="F1"),
        lambda h: _first(h).update(data_offsets=[-4, 0]),
        lambda h: _first(h).update(data_offsets=[64, 64 + _first(h)["data_offsets"][1]]),
        lambda h: _first(h).pop("shape"),
    ],
    ids=["shape", "dtype", "negative", "gap", "no-shape"],
)
def test_damaged_header(folder, change):
    victim = shards(folder)[1]
    edit_header(victim, change)
    with pytest.raises(CheckpointError, match=victim.name):
        open_checkpoint(folder)


def test_header_that_is_not_json(folder):
    victim = shards(folder)[1]
    content = bytearray(victim.read_bytes())
    content[8] = ord("!")
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_checkpoint(folder)


def test_pickle_only(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    with pytest.raises(CheckpointError, match="pickle weights only"):
        open_checkpoint(tmp_path)


def test_not_a_checkpoint(folder, tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(folder)


def test_fingerprint_sees_weights_config_and_nothing_else(folder, tmp_path):
    before = model_fingerprint(open_checkpoint(folder))
    copied = shutil.copytree(folder, tmp_path / "copy")
    assert model_fingerprint(open_checkpoint(copied)) == before
    header = copied / shards(folder)[0].name
    header.write_bytes(header.read_bytes().replace(b'"pt"', b'"tp"', 1))
    assert model_fingerprint(open_checkpoint(copied)) != before
    tensors = load_file(shards(folder)[0])
    name = next(iter(tensors))
    tensors[name].view(-1)[-1] += 1e-3
    save_file(tensors, shards(folder)[0], metadata={"format": "pt"})
    assert model_fingerprint(open_checkpoint(folder)) != before
    copied = shutil.copytree(folder, tmp_path / "another")
    before = model_fingerprint(open_checkpoint(copied))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert model_fingerprint(open_checkpoint(copied)) != before


def test_resolve(folder, tmp_path):
    assert resolve_checkpoint(folder) == folder
    for path in (str(tmp_path / "absent"), "./absent"):
        with pytest.raises(CheckpointError, match="is not a folder"):
            resolve_checkpoint(path)
    with pytest.raises(CheckpointError, match="could not be fetched"):
        resolve_checkpoint("ghost-dist-tests/no-such-model", "main")
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        resolve_checkpoint("a/b/c")


def test_gguf_is_named_as_what_it_is(tmp_path):
    file = tmp_path / "model-Q4.gguf"
    file.touch()
    for place in (lambda: resolve_checkpoint(file), lambda: open_checkpoint(tmp_path)):
        with pytest.raises(CheckpointError, match=r"GGUF, which is quantised.*gguf_file=FILE"):
            place()


def test_a_hub_without_an_address_is_not_asked_again_and_again(monkeypatch):
    """Its libraries try five times, for half a minute; a proxy may know what this host does not."""

    def no_address(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://proxy:1"})
    cache_only_without_hub()
    assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    cache_only_without_hub()
    assert constants.HF_HUB_OFFLINE
    with pytest.raises(CheckpointError, match=r"from the hub: [^.]+\. Check the name"):
        resolve_checkpoint("ghost-dist-tests/no-such-model")
