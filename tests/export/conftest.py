"""Checkpoints of the families, saved once."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
import transformers
from families import save_checkpoint

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Function from family to (Checkpoint, Architecture)."""
    root, opened = tmp_path_factory.mktemp("families"), {}

    def get(family):
        if family not in opened:
            source = open_checkpoint(save_checkpoint(family, root / family))
            opened[family] = (source, inspect_architecture(source))
        return opened[family]

    return get
