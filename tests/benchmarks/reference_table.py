"""The reference table on the trained 32-layer model: plain cut and ghost operator, three spans.

    python tests/benchmarks/reference_table.py SHARED [--out FOLDER]

SHARED holds ``models/wiki-llama-32l`` and ``data/``. float32 on the CPU, 64 x 1024 calibration
tokens packed without special tokens, absolute ridge 1e-6, perplexity over the first 32 windows of
1024 tokens. Beside each figure: the reference figure and the relative difference.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

import torch
import transformers

from ghost_dist.config import load_config
from ghost_dist.pipeline.recover import recover

REFERENCE = {  # span: corpus: dense, pruned, recovered
    "11:18": {"wikitext2": (34.25, 59.14, 43.50), "ptb": (40.79, 73.38, 54.49)},
    "9:20": {"wikitext2": (34.25, 132.38, 65.25), "ptb": (40.79, 176.38, 82.77)},
    "7:18": {"wikitext2": (34.25, 123.32, 55.62), "ptb": (40.79, 162.53, 70.67)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="ghost-dist-reference-"))
    data = arguments.shared / "data"
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    print("| span | corpus | variant | reference | measured | difference |")
    print("|---|---|---|---|---|---|")
    for span, corpora in REFERENCE.items():
        config = load_config(
            None,
            {
                "model.path": str(arguments.shared / "models" / "wiki-llama-32l"),
                "model.dtype": "float32",
                "calibration.source": str(data / "calibration.txt"),
                "calibration.windows": 64,
                "calibration.window_length": 1024,
                "selection.spans": span,
                "operator.name": "ghost",
                "operator.ridge": {"absolute": 1e-6},
                "operator.row_weights": "none",
                "operator.choose": "residual",
                "engine.device": "cpu",
                "evaluation.corpora": {
                    "wikitext2": str(data / "wikitext2-test.txt"),
                    "ptb": str(data / "ptb-test.txt"),
                },
                "evaluation.windows": 32,
                "evaluation.window_length": 1024,
                "output.path": str(out / span.replace(":", "-")),
            },
        )
        result = recover(config)
        for corpus, expected in corpora.items():
            measured = result["perplexity"][corpus]
            for variant, reference in zip(("dense", "pruned", "recovered"), expected, strict=True):
                value = measured[variant]
                print(
                    f"| [{span.replace(':', ', ')}) | {corpus} | {variant} | {reference:.2f} | "
                    f"{value:.3f} | {value / reference - 1:+.2%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
