"""Three small runs, made once: with candidates and a joint fit, of two spans, and a plain cut."""

import shutil
from pathlib import Path

import pytest

from ghost_dist.config_file import load_config
from ghost_dist.pipeline.recover import recover

CORPUS = "text"
FOLDERS = {"joint": "joint <b>&"}  # a name that is no HTML
RUNS = {
    "joint": {
        "selection.remove": 2,
        "selection.criterion": "paper",
        "operator.choose": "kl",
    },
    "spans": {
        "selection.spans": [[2, 4], [5, 6]],
        "operator.name": "ghost",
        "operator.features": "stream",
        "operator.choose": "residual",
    },
    "cut": {"selection.remove": 2, "selection.criterion": "paper", "operator.name": "none"},
}


@pytest.fixture(scope="session")
def made_runs(model_folder, text_file, tmp_path_factory):
    """Name to RUN folder; read only."""
    root = tmp_path_factory.mktemp("runs")
    for name, overrides in RUNS.items():
        config = load_config(
            None,
            {
                "model.path": str(model_folder),
                "calibration.source": str(text_file),
                "calibration.windows": 16,
                "calibration.window_length": 64,
                "evaluation.corpora": {CORPUS: str(text_file)},
                "evaluation.windows": 10,
                "evaluation.window_length": 64,
                "engine.device": "cpu",
                "output.path": str(root / FOLDERS.get(name, name)),
                **overrides,
            },
        )
        recover(config)
    return {name: root / FOLDERS.get(name, name) for name in RUNS}


@pytest.fixture
def runs(made_runs, tmp_path):
    """Copies of the runs that a test may change."""
    return {
        name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in made_runs.items()
    }
