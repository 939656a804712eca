"""Real trained weights and real text, where they are: ../shared beside the checkout, or
``GHOST_DIST_SHARED``. Elsewhere these tests are skipped and say so."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("GHOST_DIST_SHARED", Path(__file__).parents[2].parent / "shared"))


@pytest.fixture(scope="session")
def shared():
    if not (SHARED / "models" / "wiki-llama-32l" / "config.json").exists():
        pytest.skip(f"no trained model at {SHARED}; set GHOST_DIST_SHARED to its folder")
    return SHARED


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Real models use every thread."""
