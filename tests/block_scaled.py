"""Checkpoints in FP8 with scales, and the same numbers in bfloat16, made block by block."""

import json
import re
import shutil

import torch
from families import TEXT, save_checkpoint, save_tokenizer
from safetensors.torch import load_file, save_file

from ghost_dist.pipeline.recover import recover

QUANTISED = re.compile(r"layers\.\d+\..*(proj\w*|experts\.\d+\.\w+)\.weight")


def quantise(weight_OI, block):
    """(e4m3 numbers, scales, the weight they stand for in bfloat16)."""
    high, wide = block
    rows, columns = weight_OI.shape
    numbers = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // high), -(-columns // wide))
    twin = torch.empty(rows, columns, dtype=torch.bfloat16)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            scales[i, j] = weight_OI[at].float().abs().max() / 448
            numbers[at] = (weight_OI[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
            twin[at] = (numbers[at].float() * scales[i, j]).to(torch.bfloat16)
    return numbers, scales, twin


FORMS = {  # block of a weight, shape and name of its scales, quantization_config
    "tensor": (lambda o, i: (o, i), (1,), "_scale", None),  # as a script that says nothing saves it
    "static": (  # as Mistral's; the activations have a scale too
        *(lambda o, i: (o, i), (), "_scale_inv"),
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    ),
    "row": (  # as llm-compressor's
        *(lambda o, i: (1, i), (-1, 1), "_scale"),
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
    ),
}
"""Ways to store scales other than by blocks."""


def save_in_fp8(folder, stored, twin, block, form=None):
    """Write a checkpoint's FP8 form, and the bfloat16 one that it stands for; number quantised."""
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    blocks = (lambda *_: block, None, "_scale_inv", {**method, "weight_block_size": list(block)})
    block_of, shape, suffix, quantization = blocks if form is None else FORMS[form]
    for out in (stored, twin):
        shutil.copytree(folder, out)
    count, places = 0, {}
    for path in sorted(folder.glob("*.safetensors")):
        in_fp8, in_bfloat16 = {}, {}
        for name, tensor in load_file(path).items():
            in_fp8[name] = in_bfloat16[name] = tensor.to(torch.bfloat16)
            if QUANTISED.search(name) and tensor.ndim == 2:
                numbers, scales, weight = quantise(tensor, block_of(*tensor.shape))
                in_fp8[name] = numbers
                in_fp8[name + suffix] = scales if shape is None else scales.reshape(shape)
                if form == "static":
                    in_fp8[name.replace("weight", "activation_scale")] = torch.ones(())
                in_bfloat16[name] = weight
                count += 1
        save_file(in_fp8, stored / path.name, metadata={"format": "pt"})
        save_file(in_bfloat16, twin / path.name, metadata={"format": "pt"})
        places |= dict.fromkeys(in_fp8, path.name)
    index = stored / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for out in (stored, twin):
        config = json.loads((out / "config.json").read_text())
        config["dtype"] = "bfloat16"
        if out == stored and quantization is not None:
            config["quantization_config"] = quantization
        (out / "config.json").write_text(json.dumps(config))
    return count


def weights(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def recover_both(make_config, folder, family, form=None, **fields):
    """Recover a family's FP8 form with both engines, and its bfloat16 twin, and compare; the
    checkpoint of the first."""
    source = save_checkpoint(family, folder / "source", torch.bfloat16)
    save_tokenizer(source)
    text = folder / "text.txt"
    text.write_text(TEXT)
    assert save_in_fp8(source, folder / "stored", folder / "plain", (40, 28), form) > 10
    runs = {"twin": ("plain", "resident")}
    runs |= {kind: ("stored", kind) for kind in ("resident", "streaming")}
    for run, (model, kind) in runs.items():
        recover(
            make_config(
                model__path=str(folder / model),
                calibration__source=str(text),
                calibration__windows=8,
                calibration__window_length=32,
                selection__spans=[[2, 4]],
                engine__kind=kind,
                output__path=str(folder / run),
                **fields,
            )
        )
    expected = weights(folder / "twin" / "checkpoint")
    for kind in ("resident", "streaming"):
        found = weights(folder / kind / "checkpoint")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), (kind, name)
    return folder / "resident" / "checkpoint"
