"""A Hugging Face checkpoint folder as names, shapes and byte ranges.

Only ``config.json``, the index and the safetensors headers are read here, so every missing or
truncated file is found at once. Weights in pickle files are never opened.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import socket
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ghost_dist.checkpoint.language_model import language_model
from ghost_dist.checkpoint.tensor_files import (
    Scales,
    TensorInfo,
    dequantised,
    of_activations,
    read_header,
    scales_of,
    weight_block,
)
from ghost_dist.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_PROBE_BYTES = 4096
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be stored as; FP8 with scales comes to it."""
DTYPES = FLOATS | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What can be read at all."""
_HUB_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "README.md"]
_HUB_FOLDERS = ["additional_chat_templates/*.jinja"]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; its headers are sound and its files have the sizes they should have.

    Of a language model inside a model with other modalities (``language_model.py``), ``config`` and
    names are those of it by itself. Weights in FP8 are bfloat16 for whoever reads them.
    """

    path: Path
    config: dict[str, Any]  # config.json; without quantization_config where there are scales
    tensors: dict[str, TensorInfo]  # all but scales
    headers: dict[str, bytes]  # raw, by file name
    scales: dict[str, Scales] = field(default_factory=dict)  # of FP8, by name of the weight
    notes: tuple[str, ...] = ()
    taken_out: bool = False  # of a model with other modalities

    @property
    def as_in_files(self) -> bool:
        """Whether the files hold every tensor as it is and under its name."""
        return not self.scales and all(name == t.name for name, t in self.tensors.items())

    @property
    def nbytes(self) -> int:
        return sum(map(self.stored_bytes, self.tensors))

    @property
    def num_parameters(self) -> int:
        """Tied weights are stored, and counted, once."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def bytes_once_read(self) -> int:
        """As :attr:`nbytes`, with the weights in FP8 as the bfloat16 that they are read as."""
        numbers = sum(math.prod(self.tensors[name].shape) for name in self.scales)
        others = sum(t.nbytes for name, t in self.tensors.items() if name not in self.scales)
        return others + torch.bfloat16.itemsize * numbers

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor in the files, with its scales."""
        scales = self.scales.get(name)
        return self.tensors[name].nbytes + (scales.info.nbytes if scales else 0)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype that most bytes of the checkpoint have once read."""
        if self.scales:
            return torch.bfloat16
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.nbytes if tensor.dtype in FLOATS else 0
        return FLOATS.get(sizes.most_common(1)[0][0], torch.float32)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a checkpoint folder and check all of it but the numbers."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder. Give a Hugging Face checkpoint folder.")
    for file in _ADAPTER:
        if (path / file).is_file():
            raise CheckpointError(
                f"{path} holds a PEFT adapter ({file}), which is no part of the weights that are "
                "read. Merge the adapter first: PeftModel.from_pretrained(MODEL, FOLDER)"
                ".merge_and_unload().save_pretrained(NEW_FOLDER). If the model is meant without "
                "it, move the adapter's files elsewhere."
            )
    config = _read_json(path / "config.json")
    weight_map: Mapping[str, str] = {}
    if (path / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (path / INDEX).is_file():
        weight_map = _read_index(path / INDEX)
        files = sorted(set(weight_map.values()))
    else:
        raise _no_safetensors(path)
    headers: dict[str, bytes] = {}
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        headers[file], found = read_header(path / file)
        for name, tensor in found.items():
            if weight_map.get(name, file) != file:
                continue
            if name in tensors:
                raise CheckpointError(
                    f"{path}: tensor {name} is in {tensors[name].file} and in {file}, and the "
                    "index does not say which holds. Repair the index."
                )
            tensors[name] = tensor
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise CheckpointError(
            f"{path / INDEX} names {len(absent)} tensors that their shard does not hold, the first "
            f"is {absent[0]} in {weight_map[absent[0]]}. Download or copy the checkpoint again."
        )
    if not tensors:
        raise CheckpointError(f"{path} holds no tensor. Download or copy the checkpoint again.")
    scales = scales_of(path, tensors, weight_block(config))
    if scales:
        read = {scale.info.name for scale in scales.values()}
        tensors = {n: t for n, t in tensors.items() if n not in read and not of_activations(n)}
        if all(tensor.dtype in FLOATS for name, tensor in tensors.items() if name not in scales):
            config = {key: value for key, value in config.items() if key != "quantization_config"}
    notes = _own_code(config)
    inside = language_model(config, tensors)
    if inside is not None:
        config, notes = inside.config, (*notes, inside.note)
        tensors = {inside.names[name]: t for name, t in tensors.items() if name in inside.names}
        scales = {inside.names[name]: s for name, s in scales.items() if name in inside.names}
    return Checkpoint(path, config, tensors, headers, scales, notes, taken_out=inside is not None)


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor of a checkpoint, on the CPU in its own dtype; bfloat16 if that is FP8."""
    try:
        with contextlib.ExitStack() as files:
            tensor: Tensor = lazy_tensors(checkpoint, [name], files, torch.device("cpu"))[name][...]
            return tensor
    except (KeyError, OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name} cannot be read: {error}"
        ) from error


@dataclass(frozen=True)
class _ScaledTensor:
    """A weight in FP8: bfloat16 on ``device`` when indexed, of which only whole blocks are read."""

    checkpoint: Checkpoint
    name: str
    opened: Callable[[str], Any]  # a shard, by its file name
    device: torch.device

    def __getitem__(self, index: Any) -> Tensor:
        info, scales = self.checkpoint.tensors[self.name], self.checkpoint.scales[self.name]
        asked = index if isinstance(index, tuple) else (index,)
        slices = [part for part in asked if part is not Ellipsis]
        slices += [slice(None)] * (len(info.shape) - len(slices))
        read, within, blocks = [], [], []
        for part, size, block in zip(slices, info.shape, scales.block, strict=True):
            start, stop, _ = part.indices(size)
            first = start // block * block
            last = min(size, -(-stop // block) * block)
            read.append(slice(first, last))
            within.append(slice(start - first, stop - first))
            blocks.append(slice(first // block, -(-last // block)))
        stored_OI = self.opened(info.file).get_slice(info.name)[tuple(read)]
        scale = self.opened(scales.info.file).get_tensor(scales.info.name)
        grid = [-(-size // block) for size, block in zip(info.shape, scales.block, strict=True)]
        scale = scale.reshape(grid)[tuple(blocks)]
        weight_OI = dequantised(stored_OI.to(self.device), scale.to(self.device), scales.block)
        return weight_OI[tuple(within)].contiguous()  # a view would keep its whole blocks


def lazy_tensors(
    checkpoint: Checkpoint,
    names: Iterable[str],
    files: contextlib.ExitStack,
    device: torch.device,
) -> dict[str, Any]:
    """Tensors that are read when indexed, in part; ``files`` keeps the shards open.

    On the CPU, but those in FP8 on ``device``, which scales them.
    """
    shards: dict[str, Any] = {}

    def opened(file: str) -> Any:
        if file not in shards:
            shard = safe_open(checkpoint.path / file, framework="pt")
            shards[file] = files.enter_context(shard)
        return shards[file]

    found: dict[str, Any] = {}
    for name in names:
        if name in checkpoint.scales:
            found[name] = _ScaledTensor(checkpoint, name, opened, device)
        else:
            info = checkpoint.tensors[name]
            found[name] = opened(info.file).get_slice(info.name)
    return found


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """Hex sha256 of ``config.json``, headers, file sizes and both ends of every tensor.

    A change deep inside one tensor alone is not seen: hashing 140 GB at every start would cost
    more than the calibration.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for scales in checkpoint.scales.values():
        digest.update(f"\n{scales.info.name} {scales.block}\n".encode())
    stored = [*checkpoint.tensors.values(), *(s.info for s in checkpoint.scales.values())]
    for file, header in checkpoint.headers.items():
        path = checkpoint.path / file
        digest.update(f"\n{file} {path.stat().st_size}\n".encode())
        digest.update(header)
        tensors = [t for t in stored if t.file == file]
        with path.open("rb") as shard:
            for tensor in sorted(tensors, key=lambda t: t.offset):
                last = max(tensor.offset, tensor.offset + tensor.nbytes - _PROBE_BYTES)
                for offset in (tensor.offset, last):
                    shard.seek(offset)
                    digest.update(shard.read(min(_PROBE_BYTES, tensor.nbytes)))
    return digest.hexdigest()


def resolve_checkpoint(
    path_or_id: str | Path, revision: str | None = None, *, trust_remote_code: bool = False
) -> Path:
    """The checkpoint folder: a local one as it is, else a snapshot of the hub repository.

    Only JSON, tokenizer and licence files are downloaded, and the shards that the index names
    (without one ``model.safetensors``); Python files only with ``trust_remote_code``, pickle files
    and what lies in other folders never.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf":
        raise _gguf(folder)
    if folder.is_absolute() or folder.exists() or str(path_or_id).startswith((".", "~")):
        raise CheckpointError(
            f"{path_or_id} is not a folder. Give a Hugging Face checkpoint folder or a hub id."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    cache_only_without_hub()
    name = str(path_or_id)
    beside = [*_HUB_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        # Not what lies in folders: weights in other formats, which may be as large again.
        found = snapshot_download(
            name, revision=revision, allow_patterns=beside, ignore_patterns=["*/*"]
        )
        weights = [*_files_of_weights(Path(found)), *_HUB_FOLDERS]
        return Path(snapshot_download(name, revision=Path(found).name, allow_patterns=weights))
    except HFValidationError as error:
        raise CheckpointError(
            f"{path_or_id} is neither a folder nor a hub id (owner/name): {error}"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = "" if revision is None else f" at revision {revision}"
        said = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
        raise CheckpointError(
            f"{path_or_id}{at} is not a local folder and could not be fetched from the hub: "
            f"{said}. Check the name, your access and the connection, or give a folder."
        ) from error


def cache_only_without_hub() -> None:
    """Without an address of the hub, or a proxy, its libraries look into their cache only."""
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _own_code(config: Mapping[str, Any]) -> tuple[str, ...]:
    auto_map = config.get("auto_map")
    entries = auto_map if isinstance(auto_map, dict) else {}
    own = [f"{entries[key]}" for key in entries if key.startswith(("AutoModel", "AutoConfig"))]
    if not own:
        return ()
    text = (
        f"config.json names model code of its own ({', '.join(own)}), which is never run: what "
        f"transformers itself has for {config.get('model_type')} is used. If that code computes "
        "something else, the result is not of that model."
    )
    return (text,)


def _files_of_weights(folder: Path) -> list[str]:
    """Patterns of the files that hold the weights, as the index says."""
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    places = _read_json(folder / INDEX).get("weight_map")
    files = set(places.values()) if isinstance(places, dict) else set()
    return [glob.escape(file) for file in files if isinstance(file, str)]


def _read_index(path: Path) -> Mapping[str, str]:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map. Download or copy it again.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in {"", ".", ".."} or file != os.path.basename(file):
            raise CheckpointError(
                f"{path}: tensor {name} is said to be in {file!r}, which is not a plain file name "
                "in the checkpoint folder. Such an index is not followed."
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {name} is in {file!r}, which is not a safetensors file. Pickle "
                "weights are never loaded."
            )
    for file in sorted(set(weight_map.values())):
        if not (path.parent / file).is_file():
            raise CheckpointError(
                f"{path} names {file}, which is not in the folder. Download or copy it."
            )
    return weight_map


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if any(path.parent.glob("*.gguf")):
            raise _gguf(path.parent) from error
        raise CheckpointError(
            f"{path} is missing, so {path.parent} is not a Hugging Face checkpoint folder."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return content


def _gguf(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} holds a model in GGUF, which is quantised and made for llama.cpp. Give the "
        "checkpoint that it was made from (safetensors), or convert it once: AutoModelForCausalLM."
        "from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(NEW_FOLDER), and the same with "
        "AutoTokenizer."
    )


def _no_safetensors(path: Path) -> CheckpointError:
    pickles = sorted(
        file.name for suffix in (".bin", ".pt", ".pth", ".ckpt") for file in path.glob(f"*{suffix}")
    )
    if pickles:
        return CheckpointError(
            f"{path} has pickle weights only ({pickles[0]}); loading a pickle can run any code, so "
            "it is never done. Convert the checkpoint once, in a place you trust, with "
            "model.save_pretrained(...) of transformers, which writes safetensors."
        )
    return CheckpointError(f"{path} has neither {WEIGHTS} nor {INDEX}. Download or copy them.")
