"""The files of a checkpoint folder beside weights and configuration: what goes along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ghost_dist.checkpoint.load import load_tokenizer
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.errors import CheckpointError

_LEFT_BEHIND_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    ".py",  # code of the uncut model
}
_LEFT_BEHIND_NAMES = {"config.json", "readme.md"}
_FOLDERS = ("additional_chat_templates",)


def copy_side_files(source: Checkpoint, folder: Path) -> None:
    """Copy tokenizer, chat template, generation configuration, licence and the like.

    Weights of any format, their indices, Python code and the model card are left behind: they
    speak of the uncut model.
    """
    for path in sorted(source.path.iterdir()):
        name = path.name.lower()
        if (
            path.is_file()
            and not name.startswith(".")
            and name not in _LEFT_BEHIND_NAMES
            and not name.endswith(".index.json")
            and path.suffix.lower() not in _LEFT_BEHIND_SUFFIXES
        ):
            shutil.copyfile(path, folder / path.name)
    for name in _FOLDERS:
        if (source.path / name).is_dir():
            shutil.copytree(source.path / name, folder / name, copy_function=shutil.copyfile)


def name_tokenizer_class(source: Checkpoint, folder: Path) -> None:
    """Write the class of the tokenizer into ``folder/tokenizer_config.json`` if it is not there.

    Where it is not, transformers chooses it by the model type, and does not know ours.
    """
    path = folder / "tokenizer_config.json"
    content: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    if "tokenizer_class" in content or "auto_map" in content:
        return
    try:
        tokenizer = load_tokenizer(source.path)
    except CheckpointError:
        return  # a checkpoint without a tokenizer stays one
    content["tokenizer_class"] = type(tokenizer).__name__
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
