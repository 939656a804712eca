"""What a RUN folder holds, read without the code under test."""

import json

from safetensors.torch import load_file


def operators(run):
    """Bytes of every file of operators."""
    return {path.name: path.read_bytes() for path in sorted((run / "operators").iterdir())}


def operator_tensors(run):
    """Tensors by file and name."""
    return {
        f"{path.name}/{name}": tensor
        for path in sorted((run / "operators").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def worst_difference(got, expected):
    """Largest relative difference of tensors of the same names."""
    assert got.keys() == expected.keys()
    return max(float((got[n] - t).norm() / t.norm()) for n, t in expected.items())


def events(run, kind):
    """What a run has told of one kind."""
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def flip(path, position=-20, bit=1):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)
