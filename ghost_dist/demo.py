"""``ghost-dist demo``: the shipped pico model from start to finish, without a network.

The texts are modules of the user's own Python standard library: other ones for calibration than
for evaluation, and the model was not trained on the latter.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from ghost_dist.assets.stdlib_text import CALIBRATION_MODULES, EVALUATION_MODULES, stdlib_text
from ghost_dist.config import config_from_tree
from ghost_dist.pipeline.recover import recover
from ghost_dist.progress import Reporter
from ghost_dist.report.terminal import print_result

PICO = Path(__file__).parent / "assets" / "pico"


def run_demo(out: Path | None, console: Console | None = None) -> None:
    """Prune a quarter of pico's layers, recover it, print dense / pruned / recovered."""
    reporter = Reporter(console=console)
    if out is None:
        out = Path(tempfile.mkdtemp(prefix="ghost-dist-demo-"))
    texts = {"calibration": CALIBRATION_MODULES, "evaluation": EVALUATION_MODULES}
    text_folder = Path(tempfile.mkdtemp(prefix="ghost-dist-text-"))
    for name, modules in texts.items():
        (text_folder / f"{name}.txt").write_text(stdlib_text(modules), encoding="utf-8")
    config = config_from_tree(
        {
            "model": {"path": str(PICO)},
            "calibration": {
                "source": str(text_folder / "calibration.txt"),
                "windows": 32,
                "window_length": 1024,
            },
            "selection": {"remove": 5},  # of 20
            "evaluation": {
                "corpora": {"python-stdlib": str(text_folder / "evaluation.txt")},
                "windows": 16,
                "window_length": 1024,
            },
            "output": {"path": str(out)},
        }
    )
    result = recover(config, reporter)
    print_result(result, out, console)
