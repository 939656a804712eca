"""Checkpoints of random weights in the shapes of real models, written layer by layer.

Memory holds one shard at a time, so the size on the disk is only limited by the disk.
"""

import json
import re
import subprocess
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

PICO = Path(__file__).parents[2] / "ghost_dist" / "assets" / "pico"

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


FP8_BLOCK = 128
FP8_SCALE = 0.1 / 448  # 5 standard deviations of 0.02 are the largest number
HEADER = 1 << 16  # of layers that share their bytes: whole blocks of any file system


def write_random_checkpoint(
    folder, dtype=torch.bfloat16, device="cpu", *, fp8=False, distinct=None, **sizes
):
    """Write a Llama of the given sizes with N(0, 0.02^2) weights, if absent; its folder.

    ``fp8``: projections of layers in block-scaled FP8, as DeepSeek's checkpoints have them.
    ``distinct``: so many layers are drawn, and the others share their bytes on the disk, where the
    file system can (btrfs, xfs): each is a file of its own that is read from the disk by itself.
    """
    folder = Path(folder)
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.LlamaConfig(**{**LLAMA_8B, **sizes})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shards = {}
    for name, parameter in model.state_dict().items():
        found = re.search(r"layers\.(\d+)\.", name)
        shards.setdefault(found[1] if found else name, []).append((name, parameter.shape))
    weight_map, total, layers = {}, 0, {}
    generator = torch.Generator(device).manual_seed(0)
    for number, tensors in enumerate(shards.values()):
        file, drawn = f"model-{number:05d}.safetensors", {}
        found = re.search(r"layers\.(\d+)\.", tensors[0][0])
        if found and distinct and int(found[1]) >= distinct:
            alike, nbytes = layers[int(found[1]) % distinct]
            total += nbytes
            names = clone(folder / alike, folder / file, int(found[1]))
            weight_map |= dict.fromkeys(names, file)
            continue
        before = total
        for name, shape in tensors:
            drawn[name] = torch.empty(shape, dtype=dtype, device=device)
            if name.endswith("norm.weight"):
                drawn[name].fill_(1)
            else:
                drawn[name].normal_(0, 0.02, generator=generator)
            if fp8 and name.endswith("_proj.weight"):
                numbers = (drawn[name].float() / FP8_SCALE).clamp_(-448, 448)
                drawn[name] = numbers.to(torch.float8_e4m3fn)
                blocks = [-(-size // FP8_BLOCK) for size in shape]
                drawn[f"{name}_scale_inv"] = torch.full(blocks, FP8_SCALE)
        for name, tensor in drawn.items():
            drawn[name] = tensor.cpu()
            weight_map[name] = file
            total += tensor.nbytes
        save_file(drawn, folder / file, metadata={"format": "pt"})
        if found:
            layers[int(found[1])] = file, total - before
            if distinct:
                widen_header(folder / file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    config.dtype = dtype
    config.architectures = ["LlamaForCausalLM"]
    if fp8:
        method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        config.quantization_config = {**method, "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    config.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(PICO).save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def header_of(path):
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def header_bytes(entries):
    """A header of the one size, whatever the names."""
    raw = json.dumps(entries).encode()
    return (HEADER - 8).to_bytes(8, "little") + raw + b" " * (HEADER - 8 - len(raw))


def widen_header(path):
    """Write a file again with a header of the one size."""
    entries, new = header_of(path), path.with_suffix(".new")
    with path.open("rb") as source, new.open("wb") as target:
        source.seek(8 + int.from_bytes(source.read(8), "little"))
        target.write(header_bytes(entries))
        while piece := source.read(1 << 26):
            target.write(piece)
    new.rename(path)


def clone(alike, path, layer):
    """The same bytes under another layer's names; these names."""
    subprocess.run(["cp", "--reflink=always", alike, path], check=True)
    entries = header_of(alike)
    renamed = {re.sub(r"layers\.\d+\.", f"layers.{layer}.", k): v for k, v in entries.items()}
    with path.open("r+b") as file:
        file.write(header_bytes(renamed))
    return [name for name in renamed if name != "__metadata__"]
