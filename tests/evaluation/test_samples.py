"""Greedy continuations of known tokens, and which texts are continued."""

import numpy as np
import pytest
import torch
import transformers

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.evaluation.samples import (
    MOST_PROMPTS,
    PROMPT_TOKENS,
    continued,
    generation,
    printable,
    prompts,
)


def test_same_tokens_end_at_the_first_other_one_and_runs_of_four_repeat():
    dense = torch.arange(20).reshape(2, 10)
    other = dense.clone()
    other[0, 3] = 99  # what agrees again behind it does not count
    other[1] = torch.tensor([10, 11, 12, 13, 10, 11, 12, 13, 10, 11])
    found = generation({"dense": dense, "pruned": torch.zeros_like(dense), "recovered": other})
    assert found["prompts"] == 2
    assert found["tokens"] == 10
    assert found["dense"] == {"same": 10.0, "repeated": 0.0}
    # The first token of the first prompt is a 0. Of seven runs of zeros six were there before.
    assert found["pruned"] == {"same": 0.5, "repeated": pytest.approx(6 / 7)}
    assert found["recovered"]["same"] == (3 + 4) / 2
    assert found["recovered"]["repeated"] == pytest.approx(3 / 7 / 2)  # 4 runs, 7 places


def windows(number, length=64):
    tokens = np.arange(number * length, dtype=np.int32).reshape(number, length)
    return TokenWindows(tokens, source="text")


def test_prompts_are_spread_and_the_first_windows_come_first():
    corpora = {"a": windows(100), "b": windows(2, 30), "c": windows(7), "d": windows(1)}
    found = prompts(corpora)
    assert [name for name, _ in found[:3]] == ["a", "b", "c"]
    assert "d" not in dict(found)
    assert all(len(ids) == 15 for _, ids in found)  # half of the shortest window
    starts = {name: [int(ids[0]) for of, ids in found if of == name] for name in "abc"}
    assert starts["a"] == [0, 25 * 64, 50 * 64, 75 * 64]
    assert starts["b"][0] == 0
    assert len(starts["b"]) == 2
    assert len(found) <= MOST_PROMPTS
    assert len(prompts({"a": windows(100)})[0][1]) == PROMPT_TOKENS
    assert prompts({}) == []


@pytest.mark.model
@pytest.mark.parametrize(("positions", "new"), [(64, 32), (20, 8)])
def test_models_say_as_much_as_they_have_positions_for(positions, new):
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=positions, n_embd=16, n_layer=1, n_head=2, bos_token_id=0
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids_BT = torch.randint(40, (3, 12))
    said_BT = continued(model, ids_BT)
    assert said_BT.shape == (3, new)
    first_B = model(ids_BT).logits[:, -1].argmax(-1)
    assert torch.equal(said_BT[:, 0], first_B)


def test_texts_do_nothing_to_a_terminal():
    assert printable("a\x1b[31mred\x00\n\té\u4e2d\x9b") == "a\ufffd[31mred\ufffd\n\té\u4e2d\ufffd"
