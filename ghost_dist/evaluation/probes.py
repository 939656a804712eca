"""Questions that need no data set: brackets, copying, counting, and a needle in the context.

A text is a list of lines, each a question with its answer behind it, so that those before it show a
base model what is asked for. One pass over a text puts all its questions: one is answered right
where each token of the answer, the line's end among them, is the likeliest in its place, which is
when the model would have generated it.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch

Line = tuple[str, str]  # question and answer; without a question it is only shown
_SEED, _TEXTS, _SHOWN, _ASKED = 0, 3, 4, 16
_CLOSES = {"(": ")", "[": "]", "{": "}"}
_NAMES = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen"),
    *("Leo", "Maria", "Nina", "Oscar", "Paul", "Rosa", "Sam", "Tina", "Victor"),
)


def _brackets(rng: random.Random) -> Line:
    opened = rng.choices("([{", k=2)
    closed = [_CLOSES[one] for one in reversed(opened)]
    return f"Open {' '.join(opened)} close", f" {' '.join(closed)}"


def _copying(rng: random.Random) -> Line:
    words = "".join(" " + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=3)) for _ in "123")
    return f"{words[1:]} =>", words


def _arithmetic(rng: random.Random) -> Line:
    a, b = rng.randint(1, 9), rng.randint(1, 3)
    return f"{a} + {b} =", f" {a + b}"


def _needles(rng: random.Random) -> list[Line]:
    names = rng.sample(_NAMES, 8)
    numbers = {name: f" {rng.randint(100, 999)}." for name in names}
    told = [("", f"The number of {name} is{numbers[name]}") for name in names]
    told += 4 * [("", "The weather was fine and the streets were empty all day.")]
    asked = [(f"The number of {name} is", numbers[name]) for name in rng.sample(names, 8)]
    return told + asked


def probe_texts() -> dict[str, list[list[Line]]]:
    """Texts of each probe, the same every time."""
    rng = random.Random(_SEED)

    def alike(line: Callable[[random.Random], Line]) -> list[Line]:
        shown = [("", "".join(line(rng))) for _ in range(_SHOWN)]
        return shown + [line(rng) for _ in range(_ASKED)]

    lines = {"brackets": _brackets, "copying": _copying, "arithmetic": _arithmetic}
    texts = {name: [alike(line) for _ in range(_TEXTS)] for name, line in lines.items()}
    return texts | {"needle": [_needles(rng) for _ in range(2 * _TEXTS)]}


@torch.inference_mode()
def answered(model: Any, tokenizer: Any, lines: Sequence[Line]) -> list[bool]:
    """Of each question of a text, as far as the model's positions go, whether its answer is right.

    The text is tokenised as one, as the model knows it: an answer is what comes in it behind the
    tokens that it shares with the text up to there.
    """
    text, ends = "", []
    for question, answer in lines:
        asked, text = len(text) + len(question), f"{text}{question}{answer}\n"
        ends += [(asked, len(text))] if question else []
    # Behind the last line another one, since some tokenizers put a token of theirs at the end.
    ids = tokenizer(f"{text}End", verbose=False)["input_ids"]

    def tokens_of(characters: int) -> int:
        both = zip(ids, tokenizer(text[:characters])["input_ids"], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))

    places = [(tokens_of(start), tokens_of(end)) for start, end in ends]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    read = torch.tensor([ids[:limit]], device=model.device)
    said = [None, *model(read, use_cache=False).logits[0].argmax(-1).tolist()]
    return [
        start < end and ids[start:end] == said[start:end]
        for start, end in places
        if end <= read.shape[1]
    ]


def probe(model: Any, tokenizer: Any) -> dict[str, list[bool]]:
    """Of each probe, by question, whether this model answers it right."""
    return {
        name: [right for lines in texts for right in answered(model, tokenizer, lines)]
        for name, texts in probe_texts().items()
    }


def shares(found: Mapping[str, Mapping[str, list[bool]]]) -> dict[str, dict[str, Any]]:
    """Of what each model answered: by probe, how many questions, and the share that was right."""
    return {
        name: {
            "questions": len(right),
            **{model: sum(of[name]) / len(right) for model, of in found.items()},
        }
        for name, right in found.get("dense", {}).items()
        if right
    }
