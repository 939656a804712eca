"""Task files of lm-evaluation-harness on local data, and windows whose perplexity it can repeat."""

import json

import yaml

from ghost_dist.calibration.windows import build_windows


def write_task(folder, name, rows, metrics, **fields):
    """A task file on a JSONL file beside it; returns the file."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metric_list": [{"metric": metric} for metric in metrics],
        **fields,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(task))
    return file


def write_rolling(folder, texts, name="local_text"):
    """Perplexity of texts, each from BOS on."""
    return write_task(
        folder,
        name,
        [{"text": text} for text in texts],
        ["word_perplexity", "byte_perplexity", "bits_per_byte"],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
    )


def write_choices(folder, rows, name="local_choice", **fields):
    """The likeliest of ``choices`` after a ``question``; ``answer`` is the right one's number."""
    return write_task(
        folder,
        name,
        rows,
        ["acc"],
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        target_delimiter="",
        **fields,
    )


def write_generation(folder, rows, name="local_said"):
    """Whether the 6 tokens generated behind ``given`` are ``wanted``."""
    return write_task(
        folder,
        name,
        rows,
        ["exact_match"],
        output_type="generate_until",
        doc_to_text="{{given}}",
        doc_to_target="{{wanted}}",
        generation_kwargs={"until": ["@@@@"], "max_gen_toks": 6, "do_sample": False},
    )


def bos_windows(source, tokenizer, *, windows, window_length):
    """The windows that a run with ``calibration.window_bos`` evaluates, and texts of some of them.

    The harness takes texts and tokenises them. Those windows are given, by number, whose text
    without BOS has the window's tokens again; one that begins inside a word may not.
    """
    built = build_windows(
        str(source),
        tokenizer,
        windows=windows,
        window_length=window_length,
        window_bos=True,
        vocab_size=len(tokenizer),
    )
    texts = {number: tokenizer.decode(row[1:]) for number, row in enumerate(built.tokens)}
    return {
        number: text
        for number, text in texts.items()
        if tokenizer.encode(text, add_special_tokens=False) == built.tokens[number, 1:].tolist()
    }


def continuations(text, number):
    """Beginnings of ``number`` paragraphs; what follows each among what follows three others."""
    paragraphs = [p.split() for p in text.split("\n") if len(p.split()) >= 80][:number]
    ends = [" " + " ".join(words[48:64]) for words in paragraphs]
    rows = []
    for place, words in enumerate(paragraphs):
        answer = place % 4
        others = [ends[(place + 1 + step) % len(ends)] for step in range(3)]
        choices = [*others[:answer], ends[place], *others[answer:]]
        rows.append({"question": " ".join(words[:48]), "choices": choices, "answer": answer})
    return rows
