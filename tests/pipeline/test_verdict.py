"""A run whose result is no better than the plain cut says so, loudly, with what to change."""

import io
import json
import random
import shlex
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from rich.console import Console

from ghost_dist.config_file import config_tree, differing_fields, load_config, parse_set
from ghost_dist.demo import PICO
from ghost_dist.evaluation.task_rows import broken
from ghost_dist.pipeline.candidates import Candidate, Tried, least
from ghost_dist.pipeline.recover import recover
from ghost_dist.progress import Reporter
from ghost_dist.report import terminal, text, verdict
from ghost_dist.report.page import write_report
from ghost_dist.report.record import RunRecord
from ghost_dist.report.terminal import print_result, print_run
from ghost_dist.report.verdict import no_better_than_cut, remedies, sentences


@pytest.fixture
def noise(tmp_path):
    """Text that says nothing about any other."""
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz \n", k=4000)
    path = tmp_path / "noise.txt"
    path.write_text("".join(letters))
    return path


def test_a_repair_that_cannot_help(make_config, noise, text_file, tmp_path, monkeypatch):
    """Hardly more tokens of noise than unknowns, hardly a ridge: it fits them and nothing else."""
    config = make_config(
        model__path=str(PICO),  # trained: what is worse for it is worse for text
        calibration__source=str(noise),
        calibration__windows=4,
        selection__spans=[[6, 10]],
        operator__ridge={"absolute": 1e-9},
        operator__folds=2,
        evaluation__corpora={"text": str(text_file)},
        evaluation__windows=4,
        evaluation__window_length=64,
    )
    said = Console(file=io.StringIO(), width=200)
    result = recover(config, Reporter(console=said))
    value = result["perplexity"]["text"]
    assert value["recovered"] > value["pruned"]
    (found,) = result["no_better_than_cut"]
    assert found == {
        "on": "text",
        "measure": "perplexity",
        "pruned": value["pruned"],
        "recovered": value["recovered"],
    }
    run = tmp_path / "run"
    assert json.loads((run / "result.json").read_text())["no_better_than_cut"] == [found]
    assert "No better than the plain cut on: text" in (run / "checkpoint/README.md").read_text()

    for show in (lambda: print_result(result, run), lambda: print_run(run)):
        console = Console(file=io.StringIO(), width=200)
        monkeypatch.setattr(terminal, "console", console)
        show()
        printed = console.file.getvalue()
        rows = printed[printed.index("text continued") :]
        assert "texts continued greedily by 32 tokens: the first " in printed
        assert all(name in rows for name in ("dense", "pruned", "recovered"))
        assert "NO BETTER THAN THE PLAIN CUT" in printed
        words = [text.perplexity(value[variant]) for variant in ("recovered", "pruned")]
        assert f"on text the recovered model has a perplexity of {words[0]}" in printed
        assert f"the plain cut {words[1]}." in printed
        assert f"ghost-dist recover {run / 'config.yaml'} --out NEW --set calibr" in printed
        assert "calibration.windows=16" in printed
    page = write_report([run]).read_text()
    assert "The repair does not help: on text" in page
    assert "calibration.windows=16" in page
    assert "for each of the 192 regressors of ghost" in said.file.getvalue()  # before the work


def row(operator, kl=None, *, chosen=False):
    return {"operator": operator, "chosen": chosen, **({} if kl is None else {"kl": kl})}


BETTER = {"a": {"dense": 2.0, "pruned": 9.0, "recovered": 4.0}}


@pytest.mark.parametrize(
    ("candidates", "perplexity", "said"),
    [
        ([row("ghost", 0.3, chosen=True), row("none", 0.4)], BETTER, []),
        ([row("ghost", chosen=True)], BETTER, []),
        # The plain cut was asked for: nothing to warn of.
        ([row("none", chosen=True)], {"a": {"pruned": 9.0, "recovered": 9.0}}, []),
        # It was the best there was.
        (
            [row("ghost", 0.4), row("none", 0.3, chosen=True)],
            {"a": {"pruned": 9.0, "recovered": 9.0}},
            ["No operator is better than the plain cut on held-out calibration windows"],
        ),
        ([row("ghost", chosen=True)], {**BETTER, "b": {"pruned": 9.0, "recovered": 9.0}}, ["on b"]),
        # What is no number is no better either.
        ([row("ghost", chosen=True)], {"b": {"pruned": 9.0, "recovered": float("nan")}}, ["on b"]),
    ],
)
def test_what_counts_as_no_better(candidates, perplexity, said):
    chosen = next(row["operator"] for row in candidates if row["chosen"])
    found = sentences(no_better_than_cut(candidates, perplexity), chosen)
    assert len(found) == len(said)
    for sentence, part in zip(found, said, strict=True):
        assert part in sentence


FEW = [
    {"tokens_per_channel": 0.3, "span": [2, 4]},
    {"tokens_per_channel": 9.0, "span": [5, 7]},
]


def test_remedies_are_commands_that_the_program_takes(make_config, tmp_path):
    """Each reads back as a configuration in which one thing has changed."""
    settings = {"selection__spans": None, "selection__remove": 4, "calibration__windows": 5}
    config = make_config(calibration__sampling="beginning", **settings)
    run = tmp_path / "a run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config_tree(config)))
    changed = set()
    for _, command in remedies(config_tree(config), run, [], helps=False):
        program, job, file, *options = shlex.split(command)
        assert (program, job, options[:2]) == ("ghost-dist", "recover", ["--out", "NEW"])
        flags = dict(zip(options[::2], options[1::2], strict=True))
        overrides = dict([parse_set(flags["--set"])] if "--set" in flags else [])
        overrides |= {
            field: parse_set(f"a.b={flags[flag]}")[1]
            for flag, field in (("--remove", "selection.remove"), ("--operator", "operator.name"))
            if flag in flags
        }
        other = load_config(Path(file), overrides)
        changed.update(
            line.split(" in RUN")[0] + line.split(",")[1]
            for line in differing_fields(config_tree(config), config_tree(other))
        )
    chosen = make_config(selection__spans="2:4,5:7")
    of_spans = [command for _, command in remedies(config_tree(chosen), run, FEW, helps=True)]
    # 4 times as many are not enough for each regressor.
    assert sum("calibration.windows=256" in command for command in of_spans) == 1
    assert sum(command.endswith(" --remove 3") for command in of_spans) == 1
    assert changed == {
        "calibration.sampling: 'beginning' 'spread' now",
        "calibration.windows: 5 20 now",
        f"calibration.source: {config.calibration.source!r} 'FILE' now",
        "selection.remove: 4 3 now",
        "refine.steps: 0 100 now",
        "operator.name: 'ghost' 'fold' now",
        "operator.name: 'ghost' 'none' now",
    }


def test_a_repair_that_harms_one_source_is_not_taken_for_the_plain_cut():
    """Better in the mean is not enough: nobody knows which source is like the user's text."""
    ghost, fold, none = map(Tried, map(Candidate, ("ghost", "fold", "none")))
    for one, scores in ((ghost, [0.1, 0.6]), (fold, [0.45, 0.45]), (none, [0.5, 0.5])):
        one.scores = torch.tensor(scores)
    assert least([ghost, fold, none]) is fold
    assert least([ghost, none]) is none
    assert least([ghost, fold]) is ghost  # asked for by name: the plain cut is no candidate
    fold.row["failed"], fold.scores = "singular", torch.tensor([])
    assert least([fold, none]) is none


def test_the_result_stands_last(make_config, tmp_path, monkeypatch):
    """Behind the tables: what went, what it saves, where it lies, how to load it, what next."""
    result, run = recover(make_config()), tmp_path / "run"
    result = {**result, "no_better_than_cut": []}
    console = Console(file=io.StringIO(), width=300)
    monkeypatch.setattr(terminal, "console", console)
    print_result(result, run)
    *_, removed, checkpoint, load, _, speed, better = console.file.getvalue().splitlines()
    for when, folder in (("before", make_config().model.path), ("after", run / "checkpoint")):
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        assert result["bytes"][when] == pytest.approx(size, rel=0.1)  # but for headers
    assert all(f"{n / 1e3:.0f} kB" in removed for n in result["bytes"].values())
    assert checkpoint == f"checkpoint: {run / 'checkpoint'}"
    call = load.partition(": ")[2]
    model = eval(call, {"AutoModelForCausalLM": transformers.AutoModelForCausalLM})
    assert model.config.num_hidden_layers == 6
    assert speed.endswith(f"ghost-dist bench-serving {run}")
    assert f"ghost-dist recover {run / 'config.yaml'} --out NEW" in better


# Tokens for each regressor


def test_a_joint_fit_counts_its_mlp_channels(make_config, tmp_path):
    """C = 48, F = 96: 512 tokens are many for ghost and few for ghost-joint."""
    said = Console(file=io.StringIO(), width=400)
    settings = {"calibration__windows": 8, "selection__spans": [[3, 5]]}
    for name in ("ghost", "ghost-joint"):
        config = make_config(
            operator__name=name,
            operator__features="stream" if name == "ghost" else "auto",
            output__path=str(tmp_path / name),
            **settings,
        )
        result = recover(config, Reporter(console=said))
        (fit,) = result["fit"]
        assert fit["tokens_per_channel"] == 512 / (48 if name == "ghost" else 48 + 96)
        few = "3.6 calibration tokens for each regressor"
        remarks = verdict.remarks(RunRecord(tmp_path / name))
        assert any(few in remark for remark in remarks) == (name == "ghost-joint")
    printed = said.file.getvalue()
    note = "512 calibration tokens will be 3.6 for each of the 144 regressors of ghost-joint"
    assert printed.count("for each") == printed.count(note) == 1
    assert printed.index(note) < printed.rindex("removing layers")  # of the second run
    assert "--set calibration.windows=32" in printed


@pytest.mark.parametrize(("repeated", "warned"), [(0.25, False), (0.45, True)])
def test_a_model_that_repeats_itself_is_said(repeated, warned):
    models = {"dense": 0.1, "pruned": 0.9, "recovered": repeated}
    found = {name: {"same": 3.0, "repeated": share} for name, share in models.items()}
    said = broken({"prompts": 12, "tokens": 32, **found}, {})
    assert bool(said) == warned
    assert all("45% of its runs of 4 tokens" in words and "(dense: 10%)" in words for words in said)
    assert broken({}, {}) == []
