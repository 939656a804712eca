"""Checkpoints of the families, saved once; one thread, since the models are tiny."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from families import save_checkpoint

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.checkpoint.reader import open_checkpoint

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """Function from family to a model of its own and its Architecture."""
    root, opened = tmp_path_factory.mktemp("families"), {}

    def get(family):
        if family not in opened:
            source = open_checkpoint(save_checkpoint(family, root / family))
            opened[family] = (source, inspect_architecture(source))
        source, architecture = opened[family]
        model = load_causal_lm(source.path, dtype=torch.float32, device=torch.device("cpu"))
        return model, architecture

    return get
