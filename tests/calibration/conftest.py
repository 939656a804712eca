"""Text in several scripts and small tokenizers that cut it in different ways."""

import argparse
import inspect
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import transformers
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

BOS, EOS = "<bos>", "<eos>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] "
    "or m.tool_calls is defined %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
)


def make_text(copies):
    """English, code, accents, CJK, emoji, long runs of blanks; no two copies alike."""
    source = inspect.getsource(argparse)
    return "".join(
        f"{source[start : start + 3000]}\n\n   Æther café naïve 漢字かな 🙂🚀 {start}\n\n\n\t\t "
        for start in range(0, 3000 * copies, 3000)
    )


@pytest.fixture(scope="session")
def text():
    return make_text(20)


def _trained(pre_tokenizer, text, normalizer=None, alphabet=()):
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[BOS, EOS],
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def _wrapped(tokenizer):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS
    )


def byte_level(text):
    """GPT-2's: a regular expression, then bytes."""
    tokenizer = _trained(
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        text,
        alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def whole_text(text):
    """Llama 2's: merges over the whole text, blanks included, a blank prepended."""
    marks = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    tokenizer = _trained(pre_tokenizers.Split("_", "merged_with_next"), text, marks)
    tokenizer.pre_tokenizer = None
    return tokenizer


def digits_from_right(text):
    """Numbers in threes from their end: where a number is cut depends on how it goes on."""
    groups = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,3}(?=(\d{3})*\b)"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    numbers = " 1234567890" * 1000  # so that threes of digits become tokens
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = _trained(groups, numbers + text, alphabet=alphabet)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


MAKERS = {make.__name__: make for make in (byte_level, whole_text, digits_from_right)}


@pytest.fixture(scope="session")
def tokenizers_by_kind(text):
    return {name: _wrapped(make(text)) for name, make in MAKERS.items()}


@pytest.fixture(scope="session")
def _byte_level(text):
    return byte_level(text).to_str()


@pytest.fixture
def tokenizer(_byte_level):
    """Byte-level, adds BOS and EOS as special tokens, has a chat template; of one test alone."""
    made = Tokenizer.from_str(_byte_level)
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    wrapped = _wrapped(made)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
