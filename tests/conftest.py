"""What tests of several folders share: one thread, and the families' checkpoints."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from families import save_checkpoint

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.checkpoint.reader import open_checkpoint

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are tiny, and the tests run beside others; real/ has all threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Function from family to (Checkpoint, Architecture); each is saved once."""
    root, opened = tmp_path_factory.mktemp("families"), {}

    def get(family):
        if family not in opened:
            source = open_checkpoint(save_checkpoint(family, root / family))
            opened[family] = (source, inspect_architecture(source))
        return opened[family]

    return get


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """Function from family to a float32 model of its own and its Architecture."""

    def get(family):
        source, architecture = checkpoint(family)
        model = load_causal_lm(source.path, dtype=torch.float32, device=torch.device("cpu"))
        return model, architecture

    return get
