"""Three small runs, made once: with candidates and a joint fit, with a map, and a plain cut."""

import os
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
        "selection.criterion": "recoverability",
        "operator.choose": "kl",
    },
    "map": {
        "selection.remove": 3,
        "selection.criterion": "recoverability",
        "selection.max_spans": 2,
        "operator.name": "ghost",
        "operator.features": "stream",
        "operator.choose": "residual",
    },
    "cut": {"selection.remove": 2, "selection.criterion": "cosine", "operator.name": "none"},
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


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium: GHOST_DIST_CHROMIUM, one on the PATH, or playwright's own."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright; pip install -e '.[browser]'"
    )
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = [os.environ.get("GHOST_DIST_CHROMIUM"), *map(shutil.which, names)]
    with playwright.sync_playwright() as running:
        found.append(running.chromium.executable_path)
        paths = [path for path in found if path and Path(path).exists()]
        if not paths:
            pytest.skip(
                "no Chromium on the PATH or in GHOST_DIST_CHROMIUM; apt-get install chromium, or "
                "playwright install chromium"
            )
        # Chromium refuses its sandbox to root; it only opens files that the tests made.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = running.chromium.launch(executable_path=paths[0], args=arguments)
        yield opened
        opened.close()
