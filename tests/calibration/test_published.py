"""Windows of the published texts, of rows on this disk, against the published loops."""

import dataclasses
import json
import random

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ghost_dist.calibration.windows import PUBLISHED, published_windows
from ghost_dist.errors import CalibrationError

LENGTH = 16
VOCAB = 300


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, and BOS before every text, as Llama's tokenizers put it."""
    vocabulary = {"<s>": 0}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def local(name, rows, tmp_path):
    """A published text whose rows are a file of this disk."""
    text = PUBLISHED[name]
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps({text.column: row}) + "\n" for row in rows))
    options = {"data_files": {text.split: str(file)}}
    return dataclasses.replace(text, name="json", config=None, options=options)


def windows_of(text, tokenizer, windows=None):
    return published_windows(
        text, tokenizer, windows=windows, window_length=LENGTH, vocab_size=VOCAB
    )


@pytest.mark.parametrize("name", ["wikitext2", "ptb"])
def test_all_rows_are_one_text(tokenizer, tmp_path, name):
    rows = ["", " = Title = \n", "", " one two three \n", "four" * 20, ""]
    found = windows_of(local(name, rows, tmp_path), tokenizer)
    ids = tokenizer("\n\n".join(rows)).input_ids
    assert ids[0] == 0
    count = len(ids) // LENGTH
    assert found.tokens.tolist() == np.reshape(ids[: count * LENGTH], (count, LENGTH)).tolist()
    few = windows_of(local(name, rows, tmp_path), tokenizer, windows=2)
    assert few.tokens.tolist() == found.tokens[:2].tolist()


def test_c4_is_a_window_of_each_long_document(tokenizer, tmp_path):
    generator = random.Random(7)
    rows = ["".join(generator.choices("abcdef ", k=generator.randint(5, 60))) for _ in range(40)]
    text = local("c4", rows, tmp_path)
    stream = datasets.load_dataset("json", split=text.split, streaming=True, **text.options)
    drawn, expected = random.Random(0), []
    for row in stream.shuffle(seed=0, buffer_size=10_000):
        ids = tokenizer(row["text"]).input_ids
        if len(ids) >= LENGTH + 1:
            start = drawn.randint(0, len(ids) - LENGTH - 1)
            expected.append(ids[start : start + LENGTH])
    found = windows_of(text, tokenizer, windows=12)
    assert found.tokens.tolist() == expected[:12]
    with pytest.raises(CalibrationError, match=f"gives {len(expected)} windows.*256 are wanted"):
        windows_of(text, tokenizer)


def test_without_network_a_local_file_is_asked_for(tokenizer):
    # HF_HUB_OFFLINE is set for the tests.
    with pytest.raises(CalibrationError, match="Without network, give a local file"):
        windows_of(PUBLISHED["wikitext2"], tokenizer)
