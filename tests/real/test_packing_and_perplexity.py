"""The trained model of the reference figures, if it is there: real tokenizer, real text.

Looked for in the folder that GHOST_DIST_SHARED names, or else in ``shared`` beside the repository.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from ghost_dist.calibration.windows import build_windows
from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.evaluation.scores import window_scores

SHARED = Path(os.environ.get("GHOST_DIST_SHARED") or Path(__file__).parents[3] / "shared")
MODEL = SHARED / "models" / "wiki-llama-32l"

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not MODEL.is_dir(), reason=f"no trained model in {SHARED}"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


def build(name, tokenizer, windows, length=1024):
    return build_windows(
        str(SHARED / "data" / name),
        tokenizer,
        windows=windows,
        window_length=length,
        vocab_size=8192,
    )


@pytest.mark.parametrize("name", ["calibration.txt", "wikitext2-test.txt", "ptb-test.txt"])
def test_windows_are_those_of_the_whole_text(tokenizer, name):
    text = (SHARED / "data" / name).read_text(encoding="utf-8")
    if name == "calibration.txt":
        text = text[:1_500_000]  # far beyond the 64 windows; all of it takes seconds
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    for windows in (1, 5, 32, 64):
        built = build(name, tokenizer, windows)
        assert built.tokens.ravel().tolist() == whole[: windows * 1024]


def test_perplexity_is_that_of_plain_transformers(tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    windows = build("wikitext2-test.txt", tokenizer, windows=4, length=128)
    layers = LayerwiseModel(model, inspect_architecture(open_checkpoint(MODEL)))
    [result] = window_scores(layers, [Variant()], windows.tokens, batch=2)
    nats = []
    with torch.inference_mode():
        for row in torch.from_numpy(windows.tokens.astype(np.int64)):
            nats.append(model(row[None], labels=row[None]).loss.item() * 127)
    np.testing.assert_allclose(result.nats, nats, rtol=1e-5)
    assert 20 < result.perplexity < 80  # a model that has learned: its vocabulary is 8192
