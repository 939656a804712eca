"""The ghost-dist command: exit codes and messages. The demo: tests/docs/test_tutorial.py."""

import contextlib
import json
import signal

import pytest
import yaml

from ghost_dist import cli
from ghost_dist.cli import main
from ghost_dist.config_file import config_tree
from ghost_dist.durable import read_sealed, write_sealed
from ghost_dist.errors import ConfigError
from ghost_dist.pipeline.recover import recover
from ghost_dist.run_folder import RunFolder


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return stopped.value.code or 0, printed.out, printed.err


@pytest.fixture
def solved(make_config, tmp_path):
    recover(make_config(calibration__ranges=8), again="solve")
    return tmp_path / "run"


def test_verify_names_what_is_damaged_and_what_is_missing(solved, capsys):
    code, out, _ = run(capsys, "verify", solved)
    assert code == 0
    assert out.splitlines() == [
        "8 of 8 ranges are sound.",
        "1 of 1 operators are sound.",
        f"Not done yet: export. To go on: ghost-dist recover {solved / 'config.yaml'}",
    ]
    [chunk] = (solved / "statistics.zarr" / "ranges" / "00003").glob("*/0/packed/c/0")
    chunk.unlink()
    (solved / "statistics.zarr" / "ledger" / "00005.json").unlink()
    code, out, _ = run(capsys, "verify", solved)
    assert code == 1
    assert "range 3: DAMAGED" in out
    assert "not yet run: ranges 5" in out
    assert "6 of 8 ranges are sound" in out
    assert f"ghost-dist recover {solved / 'config.yaml'}" in out
    plan = solved / "statistics.zarr" / "ledger" / "plan.json"
    tree = read_sealed(plan)
    write_sealed(plan, {**tree, "entries": dict.fromkeys(tree["entries"], "of another version")})
    code, out, _ = run(capsys, "verify", solved)
    assert code == 1
    assert "statistics: DAMAGED" in out
    assert "1 of 1 operators are sound." in out
    plan.unlink()  # as where calibrate begins
    code, out, _ = run(capsys, "verify", solved)
    assert code == 0
    first, second, *_, last = out.splitlines()
    assert (first, second) == ("No statistics are there yet.", "1 of 1 operators are sound.")
    assert last.startswith("Not done yet: export.")


def test_the_command_that_verify_prints_repairs(solved, capsys):
    before = (solved / "operators" / "3-5.safetensors").read_bytes()
    [chunk] = (solved / "statistics.zarr" / "ranges" / "00003").glob("*/0/packed/c/0")
    chunk.write_bytes(b"")
    code, out, err = run(capsys, "recover", solved / "config.yaml", "--out", solved)
    assert code == 0
    assert "range 3" in err
    assert "checkpoint" in out
    assert (solved / "operators" / "3-5.safetensors").read_bytes() == before
    assert run(capsys, "verify", solved)[0] == 0


def test_verify_looks_at_operators_and_checkpoint(make_config, tmp_path, capsys):
    recover(make_config())
    folder = tmp_path / "run"
    code, out, _ = run(capsys, "verify", folder)
    assert code == 0
    assert "files of the checkpoint are there as written." in out
    (folder / "checkpoint" / "model.safetensors").write_bytes(b"x")
    (folder / "operators" / "3-5.safetensors").write_bytes(b"x")
    code, out, _ = run(capsys, "verify", folder)
    assert code == 1
    assert "checkpoint/model.safetensors: DAMAGED" in out
    assert "operator [3, 5): DAMAGED" in out
    assert "0 of 1 operators are sound." in out
    assert run(capsys, "recover", folder / "config.yaml")[0] == 0
    assert run(capsys, "verify", folder)[0] == 0


def test_a_checkpoint_in_the_layout_of_decilm(make_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ghost_dist.export.deci._STEP", 16)  # the model's MLPs are narrow
    config, folder = make_config(operator__name="norm-linear"), tmp_path / "run"
    recover(config, again="solve")
    code, _, err = run(capsys, "export-deci", folder, tmp_path / "deci")
    assert code == 2
    assert "no recovered checkpoint yet. Finish it first: ghost-dist recover" in err
    recover(config)
    code, out, _ = run(capsys, "export-deci", folder, tmp_path / "deci")
    assert code == 0
    assert f"convert_hf_to_gguf.py {tmp_path / 'deci'} --outfile" in out
    assert (tmp_path / "deci" / "config.json").is_file()
    assert run(capsys, "export-deci", folder, tmp_path / "deci")[0] == 2


def test_solve_again_prints_the_fit(solved, capsys):
    code, out, _ = run(capsys, "solve", solved, "--set", "operator.ridge.relative=0.7", "--json")
    assert code == 0
    assert json.loads(out)["fit"][0]["relative_ridge"] == pytest.approx(0.7)
    assert run(capsys, "recover", solved / "config.yaml")[0] == 0
    code, out, _ = run(capsys, "solve", solved, "--set", "operator.ridge.relative=0.5")
    assert code == 0
    assert "0.70" not in out
    assert "0.50" in out
    *_, last = out.splitlines()
    again = f"ghost-dist recover {solved / 'config.yaml'}"
    assert last == f"Checkpoint and result are older than solve. To renew: {again}"
    for command, *rest in (
        ["report"],
        ["bench-serving", "--prompt", 8, "--new", 2, "--rounds", 1],
        ["export-deci", solved / "deci"],
        ["push", "me/model", "--dry-run"],
    ):
        code, out, err = run(capsys, command, solved, *rest)
        assert last in out + err
        assert code == (2 if command in ("export-deci", "push") else 0)
    assert run(capsys, "recover", solved / "config.yaml")[0] == 0
    assert "older" not in run(capsys, "verify", solved)[1]


CALLBACK = """
import json
from pathlib import Path

def keep(event):
    with Path(__file__).with_name("seen.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\\n")
    if event["event"] in ("stage-end", "warning"):
        raise RuntimeError("no network")
"""


def test_a_callback_sees_every_event_and_may_fail(make_config, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(CALLBACK)
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(config_tree(make_config())))
    mine = ("--set", "output.callback=mine.py:keep", "--status", tmp_path / "status.json")
    code, _, err = run(capsys, "recover", config, *mine)
    assert code == 0
    assert (
        err.count("output.callback failed at the event stage-end (RuntimeError: no network)") == 1
    )
    seen = list(map(json.loads, (tmp_path / "seen.jsonl").read_text().splitlines()))
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    told = [event for event in seen if event["event"] != "progress"]
    # A warning is told to it before the event at which it failed is over, and threads take turns.
    assert sorted(map(str, told)) == sorted(str(json.loads(event)) for event in events)
    progress = [event for event in seen if event.get("stage") == "calibrate" and "part" in event]
    assert (progress[0]["done"], progress[-1]["done"]) == (0, 1024)
    assert {event["total"] for event in progress} == {1024}
    assert progress[-1]["per_second"] > 0
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["progress"] == [event for event in seen if event["event"] == "progress"][-1]
    assert status["events"] == list(map(json.loads, events))[-5:]

    (tmp_path / "other.py").write_text("def quits(event):\n    raise SystemExit(3)\n")
    code, _, err = run(
        capsys, "evaluate", tmp_path / "run", "--set", "output.callback=other.py:quits"
    )
    assert code == 0
    assert err.count("failed at the event run-start (SystemExit: 3). The run goes on") == 1
    assert RunFolder.stored_config(tmp_path / "run").output.callback.endswith("other.py:quits")
    assert run(capsys, "recover", config)[0] == 0  # without any
    assert RunFolder.stored_config(tmp_path / "run").output.callback is None


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("mine.py:keep", "(ZeroDivisionError: "),
        ("quits.py:keep", "(SystemExit: 3)"),
        ("one.py:keep", "one.py has no function keep)"),
        ("one.py:one", "one.py has no function one)"),
        ("none.py:keep", "(FileNotFoundError: "),
        ("mine", "(it names no file)"),
    ],
)
@pytest.mark.parametrize("command", ["recover", "plan"])
def test_a_callback_that_is_none_is_refused(
    make_config, tmp_path, capsys, monkeypatch, command, named, why
):
    (tmp_path / "mine.py").write_text("keep = 1 / 0")
    (tmp_path / "quits.py").write_text("raise SystemExit(3)")
    (tmp_path / "one.py").write_text("one = 1")
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(config_tree(make_config())))
    code, _, err = run(capsys, command, config, "--set", f"output.callback={named}")
    assert code == 2
    assert "output.callback=" in err
    assert f"{named} cannot be used (" in err
    assert why in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_within_its_callback(
    make_config, tmp_path, capsys, monkeypatch, number
):
    """The handler of the command line raises SystemExit, as a callback may."""
    monkeypatch.chdir(tmp_path)
    code = f"import os\ndef kill(event):\n    os.kill(os.getpid(), {int(number)})\n"
    (tmp_path / "mine.py").write_text(code)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(config_tree(make_config())))
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        code, _, err = run(capsys, "recover", config, "--set", "output.callback=mine.py:kill")
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert code == 128 + number
    assert "stopped. The same command continues." in err


def test_evaluation_may_change_from_one_call_to_the_next(make_config, text_file, tmp_path, capsys):
    """What measures the finished model is no reason to refuse the command that made it."""
    settings = {"evaluation__corpora": {"a": str(text_file)}, "evaluation__window_length": 64}
    config = make_config(**settings, evaluation__windows=2)
    first = recover(config)
    folder = tmp_path / "run"
    code, out, _ = run(capsys, "evaluate", folder, "--set", "evaluation.windows=3")
    assert code == 0
    assert "gap closed" in out
    changed = json.loads((folder / "result.json").read_text())["perplexity"]
    assert changed != first["perplexity"]
    assert recover(config)["perplexity"] == first["perplexity"]
    assert RunFolder.stored_config(folder).evaluation.windows == 2
    other = make_config(**settings, evaluation__windows=3)
    assert recover(other)["perplexity"] == changed


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["recover", "m", "--out", "r"], 2, "--remove 7"),
        (["recover", "m", "--remove", "3"], 2, "--out RUN"),
        (["recover", "m", "--remove", "3", "--operator", "gost", "--out", "r"], 2, "mean ghost"),
        (["recover", "m", "--spans", "5-7", "--out", "r"], 2, "start:stop"),
        (["recover", "no.yaml"], 2, "no.yaml cannot be read"),
        (["recover", "./nowhere", "--remove", "3", "--out", "r"], 2, "nowhere"),
        (
            ["recover", "m", "--remove", "3", "--spans", "3:5", "--out", "r"],
            2,
            "error: --remove and --spans each say what is removed: give one of them",
        ),
        (
            ["recover", "m", "--remove", "3", "--set", "selection.target=kv 60%", "--out", "r"],
            2,
            "error: --remove and target each say",
        ),
        (["recover", "smollm2", "--remove", "3"], 2, "python -m ghost_dist.real_models smollm2"),
        (
            ["recover", "m", "--remove", "3", "--set", "evaluation.corpora={a:", "FILE}"],
            2,
            "evaluation.corpora={a: ends within its braces",
        ),
        (["plan", "m", "--remove", "3%", "--target-kv", "0%"], 2, "--target-kv: give speedup 1.3"),
        (["verify", "nowhere"], 2, "not a RUN folder"),
        (["plan", "./nowhere", "--remove", "3"], 2, "nowhere"),
        (["recover"], 2, "MODEL"),
        (["recuver"], 2, "recover"),
    ],
)
def test_mistakes_give_a_message_and_a_code(
    capsys, tmp_path, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    got, _, err = run(capsys, *arguments)
    assert got == code
    assert message in err
    assert "Traceback" not in err


def test_a_text_that_is_missing_is_told_before_what_takes_long(
    make_config, text_file, tmp_path, capsys, monkeypatch
):
    """But not one whose tokens are kept, nor a dataset of the hub."""
    begun = []

    def begin(*_):
        begun.append(1)
        raise ConfigError("begun")

    monkeypatch.setattr("ghost_dist.devices.warm_up", begin)
    text = tmp_path / "own.txt"
    text.write_text(text_file.read_text())
    recover(make_config(calibration__source=str(text)), again="calibrate")
    text.unlink()
    command = ["recover", "m", "--remove", "3", "--out"]
    for setting in ("calibration.source={0}", "calibration.sources={{org/set: 0.5, {0}: 0.5}}"):
        one = setting.format(text)
        code, _, err = run(capsys, *command, tmp_path / "new", "--set", one)
        assert (code, begun) == (2, [])
        assert f"There is no file or folder {text} (working" in err
    for field in (f"calibration.source={text}", "calibration.source=org/set"):
        folder = tmp_path / ("run" if str(text) in field else "new")
        assert "begun" in run(capsys, *command, folder, "--set", field)[2]
    _, _, err = run(
        capsys, *command, tmp_path / "run", "--set", f"evaluation.corpora={{a: {text}}}"
    )
    assert "There is no file or folder" in err


def test_set_wins_over_the_file(make_config, tmp_path, capsys):
    import yaml

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config_tree(make_config())))
    code, _, _ = run(capsys, "recover", path, "--set", "operator.name=none", "--spans", "2:4")
    assert code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["operator"], result["spans"]) == ("none", [[2, 4]])


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("foo.bar=1", "Unknown configuration key foo"),
        ("operater.ridge.relative=0.1", "did you mean operator?"),
        ("operator.ridge.relativ=0.1", "did you mean operator.ridge.relative?"),
        ("operator.rigde=auto", "did you mean operator.ridge?"),
        ("calibration.windows=4", "earlier stages depend on it (operator.*, refine.* can)"),
    ],
)
def test_what_cannot_be_set_with_a_stage(tmp_path, make_config, capsys, assignment, said):
    with RunFolder(make_config()) as folder:
        folder.begin()
    code, _, err = run(capsys, "solve", tmp_path / "run", "--set", assignment)
    assert code == 2
    assert said in err
    assert RunFolder.stored_config(tmp_path / "run") == make_config()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("left", [SystemExit(1), KeyError("forward"), OSError("a closed file")])
def test_a_stop_is_said_whatever_comes_of_it(number, left, monkeypatch, capsys):
    """Ray ends a wait that a signal interrupts with a status of its own; a cleanup may fail."""

    def waits(_):
        with contextlib.suppress(SystemExit):
            signal.raise_signal(number)
        raise left

    monkeypatch.setattr(cli, "app", waits)
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main([])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert stopped.value.code == 128 + number
    assert "stopped. The same command continues." in capsys.readouterr().err
