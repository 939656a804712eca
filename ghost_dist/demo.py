"""``ghost-dist demo``: a model from start to finish on texts that every Python carries.

The shipped pico model was trained on the standard library's source, so it is shown on that; a real
one (:mod:`ghost_dist.real_models`) on English. Calibration and evaluation texts are disjoint, and
lie in the RUN folder, so that the run continues wherever and whenever it is taken up.
"""

import json
import tempfile
from pathlib import Path

from ghost_dist.assets import stdlib_text
from ghost_dist.config_file import make_config
from ghost_dist.durable import write_bytes
from ghost_dist.pipeline.recover import recover
from ghost_dist.progress import Reporter
from ghost_dist.real_models import real_model
from ghost_dist.report.terminal import print_result
from ghost_dist.run_folder import RunFolder

PICO = Path(__file__).parent / "assets" / "pico"
# Windows to calibrate on, their length, windows to measure on; of English more than four tokens for
# each of the C + F regressors of a joint fit.
_PICO_WINDOWS, _ENGLISH_WINDOWS = (32, 1024, 16), (36, 256, 8)


def run_demo(out: Path | None, model: str = "pico") -> None:
    """Prune a quarter of a model's layers, recover it, print dense / pruned / recovered."""
    reporter = Reporter()
    pico = model == "pico"
    checkpoint = PICO if pico else real_model(model, reporter.say)
    out = Path(tempfile.mkdtemp(prefix="ghost-dist-demo-")) if out is None else out.expanduser()
    reporter.say(f"RUN folder: {out}")
    if pico:
        texts = {
            "calibration": stdlib_text.stdlib_text(stdlib_text.CALIBRATION_MODULES),
            "python-stdlib": stdlib_text.stdlib_text(stdlib_text.EVALUATION_MODULES),
        }
    else:
        texts = {
            "calibration": stdlib_text.reference_text(stdlib_text.CALIBRATION_TOPICS),
            "python-reference": stdlib_text.reference_text(stdlib_text.EVALUATION_TOPICS),
            "docstrings": stdlib_text.docstring_text(stdlib_text.DOCSTRING_MODULES),
        }
    paths = {name: str(out.absolute() / "texts" / f"{name}.txt") for name in texts}
    windows, length, evaluated = _PICO_WINDOWS if pico else _ENGLISH_WINDOWS
    shape = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config = make_config(
        checkpoint,
        out=out,
        remove=shape["num_hidden_layers"] // 4,
        settings={
            "selection.effort": "quick",
            "calibration.source": paths["calibration"],
            "calibration.windows": windows,
            "calibration.window_length": length,
            "evaluation.corpora": {n: path for n, path in paths.items() if n != "calibration"},
            "evaluation.windows": evaluated,
            "evaluation.window_length": length,
        },
    )
    with RunFolder(config):
        for name, path in paths.items():
            if not Path(path).exists():  # a run keeps its texts, also when another Python continues
                Path(path).parent.mkdir(exist_ok=True)
                write_bytes(Path(path), texts[name].encode())
    print_result(recover(config, reporter), out)
