"""A recovered Llama in the layout of DeciLM, of which llama.cpp's converter makes a GGUF.

There a layer may lack its attention, or have a matrix in its place, ``x + rmsnorm(x) @ N``: what
`norm-linear` does at a gap. It becomes a layer of its own, or the attention of the layer behind the
gap if that has none. llama.cpp leaves out the attention, too, of a layer without MLP; so there the
MLP is of zeros, of the least width that the layout can express.

Legend: C hidden width, F inner width of an MLP.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from ghost_dist.checkpoint.reader import Checkpoint, open_checkpoint
from ghost_dist.errors import ConfigError
from ghost_dist.export.rewrite import new_folder, write_weights
from ghost_dist.export.shards import NewTensor, plan_shards
from ghost_dist.export.side_files import copy_side_files

_STEP = 256  # inner widths are multiples of it
_GHOST = re.compile(r"(?:model\.layers\.(\d+)|model\.norm)\.ghost\.norm_linear\.weight")
_OF_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..*)")


def export_deci(checkpoint: Path, out: Path, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write the folder ``out`` from an exported checkpoint, byte by byte; it must not be there yet.

    Raises ConfigError if the layout cannot say what the checkpoint computes, or ``out`` is there.
    """
    if out.exists():
        raise ConfigError(f"{out} exists. Give a folder that is not there yet.")
    source = open_checkpoint(checkpoint)
    _check(source)
    config, tensors = _rewritten(source)
    with new_folder(out, sum(tensor.nbytes for tensor in tensors)):
        write_weights(out, plan_shards(tensors, max_shard_bytes), {}, lambda _: None)
        copy_side_files(source, out)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check(source: Checkpoint) -> None:
    """Refuse what a GGUF of ``deci`` would silently compute otherwise."""
    family = source.config["model_type"]
    other = [f"its model_type is {family}"] if family != "ghost_llama" else []
    if found := other or _problems(source):
        raise ConfigError(
            f"{source.path} cannot be written in DeciLM's layout: {'; '.join(found)}. That takes a "
            "Llama (model_type ghost_llama) with operator.name=norm-linear, or without attentions "
            "or MLPs. If only whole layers went, with fold or no operator, llama.cpp's converter "
            "takes the checkpoint as it is."
        )


def _problems(source: Checkpoint) -> list[str]:
    """What the layout cannot say of a Llama."""
    config = source.config
    width, heads = config["hidden_size"], config["num_attention_heads"]
    rope_type = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type")
    operators = config.get("ghost_operators") or []
    removed = config.get("ghost_sublayers") or []
    inner, first = config["intermediate_size"], {"layer": 0, "part": "attention"}
    problems = {
        "it has an operator other than norm-linear": any(
            one["linear"] or not one["norm_linear"] or one["norm_eps"] != config["rms_norm_eps"]
            for one in operators
        ),
        "layer 0 has no attention": any(first.items() <= one.items() for one in removed),
        f"MLPs are {inner} wide, no multiple of {_STEP}": inner % _STEP,
        f"head_dim is not {width // heads}": config.get("head_dim", width // heads) * heads
        != width,
        "it has biases": any(name.endswith(".bias") for name in source.tensors),
        f"rope_type is {rope_type}": rope_type not in (None, "default", "llama3"),
    }
    return [problem for problem, true in problems.items() if true]


def _rewritten(source: Checkpoint) -> tuple[dict[str, Any], list[NewTensor]]:
    """Its ``config.json`` and its tensors, renumbered, with what fills layers up."""
    config = dict(source.config)
    num_layers, width = config["num_hidden_layers"], config["hidden_size"]
    gone = {(one["layer"], one["part"]) for one in config.pop("ghost_sublayers", None) or ()}
    operators = {one["boundary"] for one in config.pop("ghost_operators", None) or ()}
    config.pop("auto_map", None)
    blocks: list[dict[str, Any]] = []
    position, of_operator, filled = {}, {}, []

    def add(attention: str, inner: int) -> None:
        layer = f"model.layers.{len(blocks)}"
        group = config["num_attention_heads"] // config["num_key_value_heads"]
        blocks.append({
            "attention": {
                "n_heads_in_group": group if attention == "full" else None,
                "no_op": attention == "none",
                "replace_with_linear": attention == "linear",
            },
            "ffn": {
                "ffn_mult": 3 * (inner or _STEP) / (2 * width),
                "no_op": False,
                "replace_with_linear": False,
            },
        })  # fmt: skip
        fill = {}
        if attention == "linear":
            fill["input_layernorm"] = torch.ones(width)
        if not inner:
            fill["post_attention_layernorm"] = torch.ones(width)
            fill["mlp.gate_proj"] = fill["mlp.up_proj"] = torch.zeros(_STEP, width)
            fill["mlp.down_proj"] = torch.zeros(width, _STEP)
        for name, value in fill.items():
            filled.append(NewTensor.of(value.to(source.dtype), f"{layer}.{name}.weight"))

    for layer in range(num_layers + 1):
        free = (layer, "attention") in gone
        if layer in operators:
            of_operator[layer] = len(blocks)
            if not free:
                add("linear", 0)
        if layer < num_layers:
            position[layer] = len(blocks)
            attention = "full" if not free else "linear" if layer in operators else "none"
            add(attention, 0 if (layer, "mlp") in gone else config["intermediate_size"])

    tensors = []
    for old in source.tensors:
        name, ghost, of_layer = old, _GHOST.fullmatch(old), _OF_LAYER.fullmatch(old)
        if ghost:
            number = of_operator[int(ghost[1]) if ghost[1] else num_layers]
            name = f"model.layers.{number}.self_attn.linear_attn.weight"
        elif of_layer:
            name = f"{of_layer[1]}{position[int(of_layer[2])]}{of_layer[3]}"
        tensors.append(NewTensor.copied(source, old, name))
    config |= {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "num_hidden_layers": len(blocks),
        "block_configs": blocks,
    }
    return config, [*tensors, *filled]
