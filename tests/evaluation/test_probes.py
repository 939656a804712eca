"""Probes answered by models whose answers are known, through tokenizers of several kinds."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers

from ghost_dist.evaluation import task_rows
from ghost_dist.evaluation.probes import answered, probe, probe_texts, shares

PROBES = {"brackets", "copying", "arithmetic", "needle"}
BOS, EOS = "<s>", "</s>"


class Tokenizer:
    """Pieces that a pattern finds, with a token at the beginning and one at the end."""

    def __init__(self, pattern):
        self.pattern, self.pieces = re.compile(pattern), [BOS, EOS]

    def __call__(self, text, verbose=True):
        found = [BOS, *self.pattern.findall(text), EOS]
        self.pieces += [piece for piece in dict.fromkeys(found) if piece not in self.pieces]
        return {"input_ids": [self.pieces.index(piece) for piece in found]}

    def text(self, ids):
        return "".join(self.pieces[i] for i in ids if self.pieces[i] not in (BOS, EOS))


class Model:
    """Says in each place the token that ``next_of`` gives for all that is there."""

    device = torch.device("cpu")

    def __init__(self, next_of, positions=None):
        self.next_of = next_of
        self.config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(max_position_embeddings=positions)
        )

    def __call__(self, ids_BT, use_cache):
        ids = ids_BT[0].tolist()
        said = torch.tensor([self.next_of(ids, at) for at in range(1, len(ids) + 1)])
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said, 1000)[None])


CHARACTERS = r"(?s)."
# An answer of several tokens; the line's end is part of a full stop or bracket before it.
MERGED = r"[.)\]}]+\n?|\n| ?[a-z]{2}|(?s:.)"


def reading(tokenizer, change=lambda ids, at: None):
    """A model that knows the text, but for where it is changed."""

    def next_of(ids, at):
        changed = change(ids, at)
        return (ids[at] if at < len(ids) else 0) if changed is None else changed

    return Model(next_of)


@pytest.mark.parametrize("pattern", [CHARACTERS, MERGED])
def test_every_token_of_an_answer_counts_and_no_other(pattern):
    tokenizer = Tokenizer(pattern)
    for name, texts in probe_texts().items():
        lines = texts[0]
        asked = [line for line in lines if line[0]]
        assert answered(reading(tokenizer), tokenizer, lines) == [True] * len(asked)
        text = "".join(f"{question}{answer}\n" for question, answer in lines)
        # Characters of answers, by the question.
        place, of = 0, {}
        for number, (question, answer) in enumerate(lines):
            for at in range(place + len(question), place + len(question + answer) + 1):
                of[at] = number if question else None
            place += len(question + answer) + 1
        begins = {}  # character to the token that it is in
        ids, at = tokenizer(text)["input_ids"][1:-1], 0
        for number, piece in enumerate(ids):
            for _ in tokenizer.pieces[piece]:
                begins[at] = number + 1
                at += 1
        numbers = [number for number, line in enumerate(lines) if line[0]]
        outside = set(range(len(ids) + 1)) - {begins[c] for c, n in of.items() if n is not None}
        wrong_outside = reading(tokenizer, lambda ids, at, o=outside: 0 if at in o else None)
        assert answered(wrong_outside, tokenizer, lines) == [True] * len(asked), name
        for token in {begins[c] for c, n in of.items() if n == numbers[1]}:
            wrong = reading(tokenizer, lambda ids, at, t=token: 0 if at == t else None)
            expected = [number != 1 for number in range(len(asked))]
            assert answered(wrong, tokenizer, lines) == expected, (name, token)


def copier(tokenizer):
    """Copies what stands before an arrow, and says 0 elsewhere."""

    def next_of(ids, at):
        line = tokenizer.text(ids[:at]).rpartition("\n")[2]
        given, arrow, copied = line.partition(" =>")
        rest = f" {given}\n"[len(copied) :]
        return tokenizer.pieces.index(rest[0]) if arrow and rest else 0

    return Model(next_of)


def looks_up(ids, at):
    """What stood behind the longest run of tokens that ended like these."""
    most, found = 0, 0
    for before in range(1, at):
        same = 0
        while same < before and ids[before - 1 - same] == ids[at - 1 - same]:
            same += 1
        if same > most:
            most, found = same, ids[before]
    return found


def test_a_model_that_copies_only_copies_and_one_that_looks_up_finds_needles():
    tokenizer = Tokenizer(CHARACTERS)
    found = shares({"dense": probe(copier(tokenizer), tokenizer)})
    assert {name: of["dense"] for name, of in found.items()} == {
        **dict.fromkeys(PROBES, 0),
        "copying": 1,
    }
    assert all(of["questions"] == 48 for of in found.values())
    for lines in probe_texts()["needle"]:
        assert all(answered(Model(looks_up), tokenizer, lines))


def test_answers_are_right_and_not_all_alike():
    for name, texts in probe_texts().items():
        lines = [line for lines in texts for line in lines if line[0]]
        assert len({answer for _, answer in lines}) >= 9, name
        for question, answer in lines:
            if name == "brackets":
                left = re.sub(r"[a-zO ]", "", question + answer)
                for _ in range(9):
                    left = left.replace("()", "").replace("[]", "").replace("{}", "")
                assert left == ""
            if name == "arithmetic":
                a, _, b, _ = question.split()
                assert int(a) + int(b) == int(answer)
    assert probe_texts() == probe_texts()


def test_questions_beyond_the_positions_of_the_model_are_not_asked():
    tokenizer = Tokenizer(CHARACTERS)
    lines = probe_texts()["copying"][0]
    length = len("".join("".join(line) + "\n" for line in lines[:7]))
    known = reading(tokenizer)
    assert answered(Model(known.next_of, length + 1), tokenizer, lines) == [True] * 3
    assert shares({"dense": {"copying": []}}) == {}


def test_a_random_model_is_at_chance(model_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder, max_position_embeddings=4096
    )
    found = shares({"dense": probe(model, tokenizer)})
    assert {name: of["questions"] for name, of in found.items()} == dict.fromkeys(PROBES, 48)
    assert max(of["dense"] for of in found.values()) <= 0.05


def test_shares_rows_and_what_is_lost():
    right = {"copying": [True] * 4, "needle": [True, False, False, False]}
    none = {name: [False] * 4 for name in right}
    some = {"copying": [True, False, False, False], "needle": [False] * 4}
    found = shares({"dense": right, "pruned": none, "recovered": some})
    copying = {"questions": 4, "dense": 1.0, "pruned": 0.0, "recovered": 0.25}
    assert found["copying"] == copying
    assert task_rows.probe_rows(found) == [["copying", "4", "100%", "0%", "25%"]]
    assert "the dense model fails too: needle 25% right." in task_rows.unasked(found, [])
    assert task_rows.unasked({"copying": copying}, []) == ""
    [said] = task_rows.broken({}, found)
    assert "25% of copying (dense: 100%)." in said
    assert "needle" not in said
    assert task_rows.broken({}, {"copying": copying | {"recovered": 0.5}}) == []
