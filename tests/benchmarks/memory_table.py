"""Memory of popular models by engine, as ``ghost-dist plan`` reckons it, for docs/start.md.

    python tests/benchmarks/memory_table.py

Shapes are those of the models' published configurations; nothing of them is fetched or run.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from headers_only import write_headers

from ghost_dist.config_file import load_config
from ghost_dist.engines.memory import SHARE_OF_FREE_MEMORY
from ghost_dist.pipeline.cost import device_needs
from ghost_dist.pipeline.engine import costs_of, shape_of
from ghost_dist.planning.plan import _open

# hidden, MLP, layers, heads, key-value heads, vocabulary, tied
LLAMA = {
    "Llama 3.2 1B": (2048, 8192, 16, 32, 8, 128256, True),
    "Llama 3.2 3B": (3072, 8192, 28, 24, 8, 128256, True),
    "Llama 3.1 8B": (4096, 14336, 32, 32, 8, 128256, False),
    "Llama 3.3 70B": (8192, 28672, 80, 64, 8, 128256, False),
    "Llama 3.1 405B": (16384, 53248, 126, 128, 8, 128256, False),
}
QWEN3 = {
    "Qwen3 0.6B": (1024, 3072, 28, 16, 8, 151936, True),
    "Qwen3 4B": (2560, 9728, 36, 32, 8, 151936, True),
    "Qwen3 8B": (4096, 12288, 36, 32, 8, 151936, False),
    "Qwen3 14B": (5120, 17408, 40, 40, 8, 151936, False),
    "Qwen3 32B": (5120, 25600, 64, 64, 8, 151936, False),
}
MISTRAL = {"Mistral 7B v0.3": (4096, 14336, 32, 32, 8, 32768, False)}
FAMILIES = [
    (LLAMA, transformers.LlamaConfig, "LlamaForCausalLM"),
    (QWEN3, transformers.Qwen3Config, "Qwen3ForCausalLM"),
    (MISTRAL, transformers.MistralConfig, "MistralForCausalLM"),
]


def row(name, shape, config_class, model_class, folder):
    width, inner, layers, heads, kv, vocabulary, tied = shape
    config = config_class(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=128 if name.startswith("Qwen3") else width // heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )
    model = write_headers(folder / name, config, name=model_class)
    quarter = layers // 4
    run = load_config(
        None,
        {
            "model.path": str(model),
            "selection.spans": [[layers // 2, layers // 2 + quarter]],
            "output.path": str(folder / "run"),
            "calibration.source": str(Path(__file__)),
            "engine.batch": 1,
            "model.dtype": "bfloat16",
        },
    )
    shape = shape_of(_open(run)[0])
    needs = device_needs(
        costs_of(shape),
        shape.sizes,
        shape.num_windows,
        ranks=None,
        degrees=[],
        degree=1,
        on_cpu=False,
    )
    weights = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    held = [of_stage for residency, of_stage in needs.streaming.items() if not residency.prefetch]
    gigabytes = [
        max(by_stage.values()) / SHARE_OF_FREE_MEMORY / 1e9
        for by_stage in (needs.resident, held[0])
    ]
    return [name, layers, quarter, f"{weights / 1e9:.1f}", *(f"{gb:.1f}" for gb in gigabytes)]


def main() -> None:
    torch.set_num_threads(1)
    print("| model | layers | removed | weights, GB | whole on the GPU, GB | offloaded, GB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for shapes, config_class, model_class in FAMILIES:
            for name, shape in shapes.items():
                cells = row(name, shape, config_class, model_class, Path(folder))
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
