"""What the exporter writes, byte by byte, and what it leaves behind when it fails: nothing."""

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from families import CUTS, HIDDEN, random_operators, save_checkpoint
from safetensors import safe_open

import ghost_dist.export.rewrite as rewrite
from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import INDEX, open_checkpoint
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.errors import ExportError
from ghost_dist.export.rewrite import Copied, export_checkpoint
from ghost_dist.spans import kept_layers

SPANS = CUTS["last"]  # [2, 3) and [4, 6): one operator before layer 2, one before the norm
OPERATORS = random_operators(SPANS)


@pytest.fixture
def source(checkpoint, tmp_path):
    """A copy with every kind of side file."""
    original, architecture = checkpoint("llama")
    folder = shutil.copytree(original.path, tmp_path / "source")
    for name in (
        *("LICENSE", "README.md", "tokenizer.model", "chat_template.jinja", "notes.txt"),
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "code.py", ".hidden", "x.gguf"),
    ):
        (folder / name).write_text(name)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    return open_checkpoint(folder), architecture


def export(source, out, operators=OPERATORS, **arguments):
    export_checkpoint(
        *source, Variant(SPANS, operators), out, **{"max_shard_bytes": 70_000, **arguments}
    )
    return open_checkpoint(out)


def content(checkpoint, name):
    info = checkpoint.tensors[name]
    raw = (checkpoint.path / info.file).read_bytes()
    return raw[info.offset : info.offset + info.nbytes]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "deepseek_v3"])
def test_kept_tensors_are_the_same_bytes(checkpoint, tmp_path, family):
    source, architecture = checkpoint(family)
    export_checkpoint(source, architecture, Variant(SPANS, OPERATORS), tmp_path / "out")
    exported = open_checkpoint(tmp_path / "out")
    expected = set()
    new_index = {old: new for new, old in enumerate(kept_layers(SPANS, 6))}
    for name in source.tensors:
        rest = name.removeprefix(architecture.tensor_prefix + ".")
        if rest != name:
            layer, _, rest = rest.partition(".")
            if int(layer) not in new_index:
                continue
            new_name = f"{architecture.tensor_prefix}.{new_index[int(layer)]}.{rest}"
        else:
            new_name = name
        expected.add(new_name)
        assert content(exported, new_name) == content(source, name), name
        assert exported.tensors[new_name].shape == source.tensors[name].shape
        assert exported.tensors[new_name].dtype == source.tensors[name].dtype
    operators = {
        f"{architecture.tensor_prefix}.2.ghost.linear.weight",
        f"{architecture.final_norm}.ghost.linear.weight",
    }
    assert set(exported.tensors) == expected | operators


def test_operators_are_transposed_once(source, tmp_path):
    exported = export(source, tmp_path / "out")
    first, second = (OPERATORS[span] for span in SPANS)
    for name, value in (
        ("model.layers.2.ghost.linear.weight", first.weight_CC.T),
        ("model.norm.ghost.linear.weight", second.weight_CC.T),
    ):
        with safe_open(exported.path / exported.tensors[name].file, "pt") as file:
            assert torch.equal(file.get_tensor(name), value)


def test_shards(source, tmp_path):
    exported = export(source, tmp_path / "out", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    sizes = {}
    for tensor in exported.tensors.values():
        assert index["weight_map"][tensor.name] == tensor.file
        assert tensor.offset % 4 == 0
        sizes.setdefault(tensor.file, []).append(tensor.nbytes)
    assert len(sizes) > 5
    assert all(sum(found) <= 40_000 for found in sizes.values())
    assert index["metadata"]["total_size"] == exported.nbytes
    export(source, tmp_path / "small", max_shard_bytes=1)
    single = export(source, tmp_path / "single", max_shard_bytes=1 << 30)
    assert set(single.headers) == {"model.safetensors"}
    assert not (tmp_path / "single" / INDEX).exists()
    assert {n: content(single, n) for n in single.tensors} == {
        n: content(exported, n) for n in exported.tensors
    }


@pytest.mark.parametrize("spans", [SPANS, CUTS["first"]])
def test_what_was_copied_ahead_is_taken_where_it_is_of_the_same_cut(source, tmp_path, spans):
    down_FC = source[1].inner_sizes[1], HIDDEN
    new = {SPANS[0]: replace(OPERATORS[SPANS[0]], down_FC=torch.rand(*down_FC))}
    whole = export(source, tmp_path / "whole", OPERATORS | new)
    copied = Copied.plan(*source, Variant(spans), tmp_path / "ahead", 70_000)
    assert set(copied.write(lambda _: None)) == set((tmp_path / "ahead").iterdir())
    inodes = {path.stat().st_ino for path in (tmp_path / "ahead").iterdir()}
    written = []
    export(source, tmp_path / "out", OPERATORS | new, copied=copied, advance=written.append)
    assert sum(written) == whole.nbytes
    files = {path.name: path for path in (tmp_path / "out").iterdir() if path.is_file()}
    for name, path in files.items():
        assert path.read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    taken = [path for path in files.values() if path.stat().st_ino in inodes]
    assert len(taken) == (len(copied.shards) if spans == SPANS else 0)
    assert not Copied.plan(*source, Variant(spans), tmp_path / "none", 1 << 30).shards


def test_config(source, tmp_path):
    before = source[0].config
    exported = export(source, tmp_path / "out").config
    assert exported["num_hidden_layers"] == 3
    assert exported["model_type"] == "ghost_llama"
    parts = {"linear": True, "norm_linear": False, "norm_eps": 0.0}
    assert exported["ghost_operators"] == [
        {"boundary": 2, **parts},
        {"boundary": 3, **parts},
    ]
    own = {"architectures", "auto_map", "ghost_operators", "model_type", "num_hidden_layers"}
    assert {k: v for k, v in exported.items() if k not in own} == {
        k: v for k, v in before.items() if k not in own
    }


def test_side_files(source, tmp_path):
    extra = tmp_path / "config.yaml"
    extra.write_text("model: {}")
    export(source, tmp_path / "out", extra_files={"config.yaml": extra, "note.txt": b"hello"})
    found = {p.name for p in (tmp_path / "out").iterdir() if p.suffix != ".safetensors"}
    assert found == {
        *("config.json", "generation_config.json", "modeling_ghost_llama.py", INDEX),
        *("LICENSE", "tokenizer.model", "chat_template.jinja", "notes.txt"),
        *("additional_chat_templates", "config.yaml", "note.txt"),
    } | (found & {"tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"})
    assert (tmp_path / "out" / "note.txt").read_bytes() == b"hello"
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "tool"
    original = source[0].path / "generation_config.json"
    assert (tmp_path / "out" / original.name).read_bytes() == original.read_bytes()


def test_progress_counts_every_byte(source, tmp_path):
    counted = []
    exported = export(source, tmp_path / "out", advance=counted.append)
    assert sum(counted) == exported.nbytes


def test_source_in_dtype_of_half_the_size(tmp_path):
    """float64 operators are rounded to the checkpoint's dtype."""
    folder = save_checkpoint("llama", tmp_path / "m", dtype=torch.bfloat16)
    checkpoint = open_checkpoint(folder)
    operators = {s: Repair(o.weight_CC.double()) for s, o in OPERATORS.items()}
    exported = export((checkpoint, inspect_architecture(checkpoint)), tmp_path / "out", operators)
    assert {tensor.dtype for tensor in exported.tensors.values()} == {"BF16"}


def test_what_the_model_does_not_take_is_dropped(checkpoint, tmp_path):
    """MTP layers sit behind the last layer, and renumbered ones would collide with them; old
    checkpoints hold rotary buffers that are computed today."""
    from safetensors.torch import save_file

    original, _ = checkpoint("deepseek_v3")
    folder = shutil.copytree(original.path, tmp_path / "mtp")
    index = json.loads((folder / INDEX).read_text())
    buffer = "model.layers.1.self_attn.rotary_emb.inv_freq"
    extra = dict.fromkeys(("model.layers.6.eh_proj.weight", "mtp.fc.weight", buffer), 4)
    extra = {name: torch.ones(size) for name, size in extra.items()}
    save_file(extra, folder / "extra.safetensors")
    index["weight_map"].update(dict.fromkeys(extra, "extra.safetensors"))
    (folder / INDEX).write_text(json.dumps(index))
    config = {**original.config, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(folder)
    architecture = inspect_architecture(source)
    export_checkpoint(source, architecture, Variant(SPANS, OPERATORS), tmp_path / "out")
    exported = open_checkpoint(tmp_path / "out")
    assert architecture.unused == extra.keys()
    assert not [n for n in exported.tensors if "eh_proj" in n or "mtp" in n or "inv_freq" in n]
    assert exported.config["num_nextn_predict_layers"] == 0


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "source")


def fails(monkeypatch, number, error):
    """Let the nth write to a shard fail."""
    calls = iter(range(1_000_000))
    real = os.copy_file_range

    def copy(*arguments):
        if next(calls) == number:
            raise error
        return real(*arguments)

    monkeypatch.setattr(os, "copy_file_range", copy)


@pytest.mark.parametrize("number", [0, 7, 25])
def test_disk_full(source, tmp_path, monkeypatch, number):
    fails(monkeypatch, number, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(ExportError, match="No space left on device.*Nothing was left there"):
        export(source, tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("step", ["copy_side_files", "_write_config"])
def test_disk_full_in_later_steps(source, tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rewrite, step, fail)
    with pytest.raises(ExportError, match="No space left"):
        export(source, tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_any_other_failure_leaves_nothing(source, tmp_path, monkeypatch, error):
    fails(monkeypatch, 9, error)
    with pytest.raises(type(error)):
        export(source, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_copy_without_the_kernel(source, tmp_path, monkeypatch):
    expected = export(source, tmp_path / "expected")

    def refuse(*_):
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    exported = export(source, tmp_path / "out")
    for name in expected.headers:
        assert (exported.path / name).read_bytes() == (expected.path / name).read_bytes()


def test_too_little_space_is_told_before_writing(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ExportError, match="Not enough disk space"):
        export(source, tmp_path / "deeper" / "out")
    assert leftovers(tmp_path) == []


def test_output_not_empty(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(ExportError, match="not an empty folder"):
        export(source, out)
    assert (out / "precious").read_text() == "mine"
    assert leftovers(out) == ["precious"]


def test_empty_output_folder_is_used(source, tmp_path):
    (tmp_path / "out").mkdir()
    export(source, tmp_path / "out")
    assert leftovers(tmp_path) == ["out"]


def test_output_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="could not be written"):
        export(source, tmp_path / "file" / "out")

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(ExportError, match="Read-only file system"):
        export(source, tmp_path / "out")


def test_source_that_shrinks(source, tmp_path):
    victim = max(source[0].path.glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(ExportError, match="changed during the export"):
        export(source, tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (Repair(torch.eye(HIDDEN + 1)), r"shape \(65, 65\), expected \(64, 64\)"),
        (
            Repair(down_FC=torch.zeros(64, 96)),
            r"down_proj\.weight has shape \(64, 96\), expected \(96, 64\)",
        ),
        (Repair(torch.full((HIDDEN, HIDDEN), float("nan"))), "NaN or Inf"),
        (Repair(torch.full((HIDDEN, HIDDEN), 1e300, dtype=torch.float64)), "NaN or Inf as"),
    ],
    ids=["shape", "down_proj", "nan", "overflow"],
)
def test_operators_that_cannot_be_stored(source, tmp_path, operator, message):
    with pytest.raises(ExportError, match=message):
        export(source, tmp_path / "out", {SPANS[0]: operator})
    assert leftovers(tmp_path) == []
