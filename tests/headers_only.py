"""Checkpoints of the size of real ones, without their data."""

import json
import math
import struct

import torch
import transformers

from ghost_dist.checkpoint.twin import empty_model


def write_headers(folder, config, dtype=torch.bfloat16, name="LlamaForCausalLM"):
    """A checkpoint of the right shape and size that holds no data: one sparse file a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [name]
    config.save_pretrained(folder)
    model = empty_model(getattr(transformers, name), config)
    shards = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        number = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{number}.safetensors", {})[name] = tuple(tensor.shape)
    weight_map = {}
    for file, tensors in shards.items():
        header, offset = {}, 0
        for name, shape in tensors.items():
            nbytes = math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": "BF16",
                "shape": list(shape),
                "data_offsets": [offset, offset + nbytes],
            }
            offset += nbytes
            weight_map[name] = file
        raw = json.dumps(header).encode()
        path = folder / file
        path.write_bytes(struct.pack("<Q", len(raw)) + raw)
        with path.open("r+b") as opened:
            opened.truncate(8 + len(raw) + offset)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder
