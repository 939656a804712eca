"""Every command of ``ghost-dist`` in a process of its own, on each GPU, resident and streaming.

A fresh process has not begun CUDA, and its current GPU is the first: what forgets to name its
device fails here, or computes on weights that are still on their way to the second one. The
commands of all devices and engines run side by side before the first test; each test looks at one
of them, so that one that fails hides no other.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
import typer

from ghost_dist.cli import app
from ghost_dist.pipeline.fitting import fit_room

DEVICES = [f"cuda:{number}" for number in range(min(2, torch.cuda.device_count()))]
ENGINES = ["resident", "streaming"]
CASES = [(device, engine) for device in DEVICES for engine in ENGINES]
ON_A_CLUSTER = {"submit", "jobs"}
"""They start and ask processes of a Ray cluster: tests/cluster/test_jobs.py. What those run on
GPUs is in test_two_gpus.py."""
WITHOUT_A_DEVICE = {"export-deci"}
"""It rewrites files: tests/export/test_deci.py."""
AT_ONCE = 8

CHAIN = {
    "plan": "plan {model} {run} {settings} --measure --json",
    "recover": "recover {model} {run} {settings}",
    "select": "select RUN",
    "calibrate": "calibrate RUN",
    "solve": "solve RUN",
    "export": "export RUN",
    "evaluate": "evaluate RUN",
    "report": "report RUN",
    "verify": "verify RUN",
    "bench-serving": "bench-serving RUN --prompt 16 --new 4 --rounds 1 --json",
    "push": "push RUN owner/name --dry-run",
}
"""One after the other on one RUN, for each device and engine."""
ALONE = {
    "compare": "compare {model} {settings} --remove 2 --operators none,ghost,default"
    " --selection search,paper --out OUT",
    "demo": "demo --out OUT",
}
"""Once for each device: they hold the model whole."""

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DEVICES, reason="no NVIDIA GPU"),
    pytest.mark.timeout(1500),  # the first test waits for all commands
]


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    arguments: list[str]
    code: int
    out: str
    err: str

    def check(self):
        said = f"stdout:\n{self.out[-3000:]}\nstderr:\n{self.err[-6000:]}"
        assert self.code == 0, f"{' '.join(self.arguments)}: exit {self.code}\n{said}"


def test_every_command_is_run_here():
    """A new one needs a line in CHAIN or ALONE."""
    commands = set(typer.main.get_command(app).commands)
    assert commands == CHAIN.keys() | ALONE.keys() | ON_A_CLUSTER | WITHOUT_A_DEVICE


def start(arguments, folder, **environment):
    folder.mkdir(parents=True, exist_ok=True)
    places = {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "4"}
    done = subprocess.run(
        [sys.executable, "-m", "ghost_dist", *arguments],
        cwd=folder,
        env={**os.environ, **places, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return Done(arguments, done.returncode, done.stdout, done.stderr)


def settings(device, engine, text, **fields):
    given = {
        "engine.device": device,
        "engine.kind": engine,
        "calibration.source": text,
        "calibration.window_length": 64,
        "calibration.windows": 16,
        # What KL chooses among, and how close it calls it, is the demo's and compare's to show.
        "operator.name": "ghost-joint",
        "operator.features": "stream",
        "operator.choose": "residual",
        **{key.replace("__", "."): value for key, value in fields.items()},
    }
    return [word for key, value in given.items() for word in ("--set", f"{key}={value}")]


def evaluation(text):
    fields = {"corpora": f"{{a: {text}}}", "windows": 4, "window_length": 64}
    return [w for key, value in fields.items() for w in ("--set", f"evaluation.{key}={value}")]


@pytest.fixture(scope="module")
def big(model_folder, tmp_path_factory):
    """A random Llama whose layers take milliseconds to copy, while the one before computes."""
    folder = tmp_path_factory.mktemp("big")
    wide = 2048 if DEVICES[0].startswith("cuda") else 64
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=wide,
        intermediate_size=2 * wide,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=transformers.AutoConfig.from_pretrained(model_folder).vocab_size,
        max_position_embeddings=1024,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    for file in model_folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def commands(model_folder, big, text_file, tmp_path_factory):
    """What became of every command, by device, engine and name."""
    root = tmp_path_factory.mktemp("commands")

    def chain(device, engine):
        folder = root / f"{device}-{engine}".replace(":", "")
        folder.mkdir()
        of_run = settings(device, engine, text_file) + evaluation(text_file)
        places = {
            "{model}": [str(model_folder)],
            "{run}": ["--remove", "2", "--out", "RUN"],
            "{settings}": of_run,
        }
        return [
            ((device, engine, name), start(filled(line, places), folder))
            for name, line in CHAIN.items()
        ]

    def alone(device):
        folder = root / f"{device}-alone".replace(":", "")
        number = device.partition(":")[2]
        places = {
            "{model}": [str(model_folder)],
            "{settings}": settings(
                *(device, "auto", text_file), operator__name="auto", operator__choose="kl"
            )
            + evaluation(text_file),
        }
        found = []
        for name, line in ALONE.items():
            # The demo takes the first GPU that it sees.
            seen = {"CUDA_VISIBLE_DEVICES": number} if name == "demo" and number else {}
            done = start(filled(line, places), folder / name, **seen)
            found.append(((device, "auto", name), done))
        return found

    def of_big(device, engine):
        folder = root / f"{device}-{engine}-big".replace(":", "")
        given = settings(
            *(device, engine, text_file),
            calibration__window_length=512,
            calibration__windows=32,
            engine__batch=4,
            operator__ridge="{relative: 0.01}",
        )
        arguments = ["recover", str(big), "--spans", "2:4", "--out", "RUN", *given]
        return [((device, engine, "big"), start(arguments, folder))]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(of_big, *case) for case in CASES]
        jobs += [pool.submit(chain, *case) for case in CASES]
        jobs += [pool.submit(alone, device) for device in DEVICES]
        found = dict(pair for job in jobs for pair in job.result())
    return root, found


def filled(line, places):
    return [word for part in line.split() for word in places.get(part, [part])]


def folder_of(commands, device, engine, *more):
    return commands[0] / "-".join([device.replace(":", ""), engine, *more])


class TestOnGPUs:
    pytestmark = gpu

    @pytest.mark.parametrize("name", [*CHAIN, "big"])
    @pytest.mark.parametrize(("device", "engine"), CASES)
    def test_command_ends_well(self, commands, device, engine, name):
        commands[1][device, engine, name].check()

    @pytest.mark.parametrize("name", ALONE)
    @pytest.mark.parametrize("device", DEVICES)
    def test_command_that_holds_the_model_whole_ends_well(self, commands, device, name):
        commands[1][device, "auto", name].check()

    @pytest.mark.parametrize(("device", "engine"), CASES)
    def test_the_engine_and_the_device_are_those_asked_for(self, commands, device, engine):
        run = folder_of(commands, device, engine) / "RUN"
        record = json.loads((run / "stages" / "engine.json").read_text())["outputs"]
        assert record.pop("fit_room") == fit_room(torch.device(device))
        driver = torch.device(device).type
        assert record == {"kind": engine, "driver": driver, "dtype": "float32"}
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        assert any(event["event"] == "layers-read" for event in events) == (engine == "streaming")
        result = json.loads((run / "result.json").read_text())
        assert ("NVIDIA" in result["device"]) == device.startswith("cuda")
        planned = json.loads(commands[1][device, engine, "plan"].out)
        assert planned["engine"]["kind"] == engine

    @pytest.mark.parametrize("size", [[], ["big"]], ids=["tiny", "big"])
    def test_operators_are_equal_bit_by_bit(self, commands, size):
        """Between engines, and between GPUs of a kind."""
        first, *others = CASES
        expected = operators(folder_of(commands, *first, *size))
        assert expected, "no operator was written"
        different = {
            f"{device} {engine}": sorted(
                name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)
            )
            for device, engine in others
            if same_kind(device, first[0])
            and (got := operators(folder_of(commands, device, engine, *size))) != expected
        }
        assert not different, f"other than {' '.join(first)}: {different}"


def same_kind(device, other):
    if not device.startswith("cuda"):
        return True
    return torch.cuda.get_device_name(device) == torch.cuda.get_device_name(other)


def operators(folder: Path):
    return {path.name: path.read_bytes() for path in (folder / "RUN" / "operators").glob("*.safe*")}
