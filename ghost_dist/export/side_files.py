"""The files of a checkpoint folder beside weights and configuration: what goes along."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files

from ghost_dist.checkpoint.reader import Checkpoint

_LEFT_BEHIND_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    ".py",  # code of the uncut model
}
_LEFT_BEHIND_NAMES = {
    *("config.json", "readme.md"),
    # of other modalities, which the result does not have
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
}


def copy_side_files(source: Checkpoint, folder: Path) -> None:
    """Copy tokenizer, generation configuration, licence: not what speaks of the uncut model."""
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
    templates = source.path / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name, copy_function=shutil.copyfile)


def keep_tokenizer(tokenizer: Any, folder: Path, *, new_model_type: bool) -> None:
    """Have transformers make the same tokenizer of ``folder`` as of the original.

    For a model type that it does not know, such as ours, it takes the class that
    ``tokenizer_config.json`` names, and many checkpoints name one that their family does not use:
    the class that was chosen for the original is written there. Code goes along if it was run.
    """
    path = folder / "tokenizer_config.json"
    content: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    before = dict(content)
    content.pop("auto_map", None)
    if has_own_code(tokenizer):
        custom_object_save(tokenizer, folder, content)
    elif new_model_type:
        content["tokenizer_class"] = type(tokenizer).__name__
    if content != before:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def has_own_code(tokenizer: Any) -> bool:
    """Whether the class of a tokenizer came with its checkpoint."""
    return not type(tokenizer).__module__.startswith("transformers.")


def tokenizer_code(folder: Path) -> set[str]:
    """Names of the Python files in ``folder`` that its tokenizer consists of."""
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_bytes()) if path.is_file() else {}
    names = content.get("auto_map", {}).get("AutoTokenizer", ())
    files = {folder / f"{name.partition('.')[0]}.py" for name in names if name is not None}
    return {
        Path(needed).name
        for file in files
        if file.is_file()
        for needed in (file, *get_relative_import_files(file))
    }
