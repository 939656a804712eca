"""What tests of several folders share: one thread, the families' checkpoints, and a tiny Llama with
a tokenizer of its own and texts: everything a run needs, in seconds."""

import argparse
import contextlib
import functools
import gc
import inspect
import json
import os
import re
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of several workers and of what they start would wait for each other's cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ranks would wait for whatever the other half of the suite computes: Ray starts them at nice 15.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
import torch
import transformers
from families import save_checkpoint
from forked import Changed, forked_python
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.config_file import load_config
from ghost_dist.export import verify
from ghost_dist.planning import probe

transformers.utils.logging.disable_progress_bar()

TEXT = inspect.getsource(argparse) + inspect.getsource(json)


MODEL_FIXTURES = {"checkpoint", "cluster", "loaded", "make_config", "model_folder", "shared"}
LONG = ("test_reference_table", "test_tutorial", "test_kill", "test_real_models", "test_harness")
ALL_NEED_A_MODEL = re.compile(r"(?m)^from (all_)?families import|^pytestmark = .*mark\.model")


@functools.cache
def all_need_a_model(path):
    return ALL_NEED_A_MODEL.search(path.read_text(encoding="utf-8")) is not None


def pytest_ignore_collect(collection_path, config):
    """With ``-m 'not model'``, files that have no other tests: reading them takes seconds."""
    leaves_out = "not model" in config.option.markexpr and collection_path.suffix == ".py"
    return True if leaves_out and all_need_a_model(collection_path) else None


@pytest.hookimpl(tryfirst=True)  # before the marks are looked at, by -m and by xdist
def pytest_collection_modifyitems(config, items):
    """What needs a model, and what workers run side by side.

    The latter are files of their own, and all of Ray's in one of them: two clusters at once on two
    cores wait for each other. Files of few, long tests come first, or one worker would be left with
    them in the end.
    """
    for item in items:
        if all_need_a_model(item.path) or not MODEL_FIXTURES.isdisjoint(item.fixturenames):
            item.add_marker("model")
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        on_ray = "cluster" in (item.path.parent.name, item.path.stem.removeprefix("test_"))
        item.add_marker(pytest.mark.xdist_group("ray" if on_ray else str(item.path)))
    items.sort(key=_turn)


def _turn(item):
    if item.get_closest_marker("xdist_group").args == ("ray",):
        return 0
    return 1 if item.path.stem in LONG else 2


def pytest_collection_finish():
    """Runs collect garbage, which need not look through everything that was imported each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def forked(forked_at_need):
    """Executable that is ``python`` with the libraries imported, and the process it forks from."""
    return forked_at_need()


@pytest.fixture(scope="session")
def forked_at_need():
    """The same as a function: the server begins with the first call."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda: stack.enter_context(forked_python()))


@pytest.fixture(scope="session", autouse=True)
def fresh_processes_are_forked(forked_at_need):
    """Every run ends by loading its export in a fresh process; a plan measures how long one takes.

    Commands that tests run in a process of their own start it as users do.
    """

    class Forking(Changed):
        executable = property(lambda _: str(forked_at_need().program))

    with pytest.MonkeyPatch.context() as patch:
        for module in (verify, probe):
            patch.setattr(module, "sys", Forking(sys))
        yield


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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=256,
        initializer_range=0.08,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def config_at(model_folder, text_file):
    """Configuration of a small run in a folder; overrides as dotted keys."""

    def make(run, **overrides):
        given = {
            "model.path": str(model_folder),
            "calibration.source": str(text_file),
            "calibration.windows": 16,
            "calibration.window_length": 64,
            "selection.spans": [[3, 5]],
            "selection.criterion": "paper",
            "operator.name": "ghost",
            "operator.features": "stream",
            "operator.choose": "residual",
            "engine.device": "cpu",
            "output.path": str(run),
        }
        given |= {key.replace("__", "."): value for key, value in overrides.items()}
        return load_config(None, given)

    return make


@pytest.fixture
def make_config(config_at, tmp_path):
    """The same in the test's own folder."""
    return functools.partial(config_at, tmp_path / "run")


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
