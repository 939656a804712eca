import pytest

from ghost_dist.calibration.documents import render_chat
from ghost_dist.errors import CalibrationError


def test_messages_are_rendered_by_the_template(tokenizer):
    chat = [{"role": "user", "content": "hi", "tool_calls": None}]
    assert render_chat(tokenizer, chat, "row 1") == "<bos>user: hi<eos>"


def test_sharegpt_messages_mean_the_same(tokenizer):
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    sharegpt = [{"from": speaker, "value": speaker, "role": None} for speaker in roles]
    messages = [{"role": role, "content": speaker} for speaker, role in roles.items()]
    assert render_chat(tokenizer, sharegpt, "") == render_chat(tokenizer, messages, "")


def test_unknown_speaker_is_named(tokenizer):
    with pytest.raises(CalibrationError, match=r"row 3 has a message from 'alien'.*human, user"):
        render_chat(tokenizer, [{"from": "alien", "value": "x"}], "row 3")


def test_template_that_refuses(tokenizer):
    with pytest.raises(CalibrationError, match=r"row 3: .*refuses.*no such role.*roles are tool"):
        render_chat(tokenizer, [{"role": "tool", "content": "x"}], "row 3")


def test_tokenizer_without_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match=r"row 3 is a chat, and this tokenizer has no chat"):
        render_chat(tokenizer, [{"role": "user", "content": "x"}], "row 3")


TRIMMING = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }};{% endfor %}"


def test_text_parts_are_joined(tokenizer):
    """A template that trims would write Python's form of the list."""
    tokenizer.chat_template = TRIMMING
    parts = [{"type": "text", "text": " one "}, {"type": "text", "text": "two", "id": None}]
    assert render_chat(tokenizer, [{"role": "user", "content": parts}], "") == "user: one two;"
    value = [{"from": "human", "value": parts}]
    assert render_chat(tokenizer, value, "") == "user: one two;"


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": "x"}, {"type": "text", "text": 7}, "loose"]
)
def test_other_parts_are_refused(tokenizer, part):
    chat = [{"role": "user", "content": [{"type": "text", "text": "look"}, part]}]
    with pytest.raises(CalibrationError, match=r"row 3 has a part .*only parts of text"):
        render_chat(tokenizer, chat, "row 3")
