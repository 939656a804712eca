"""The RUN folder: who may use it and for which configuration."""

import os
import subprocess
import sys

import pytest

from ghost_dist.config_file import load_config
from ghost_dist.errors import RunFolderError, RunMismatchError
from ghost_dist.run_folder import RunFolder


def config(path, **changes):
    return load_config(
        None, {"model.path": "m", "selection.remove": 3, "output.path": str(path), **changes}
    )


def test_same_configuration_continues(tmp_path):
    with RunFolder(config(tmp_path / "run")) as run:
        run.begin()
        run.finish("solve", "abc", {"x": 1})
    with RunFolder(config(tmp_path / "run")) as run:
        assert run.record("solve", "abc") == {"x": 1}
        assert run.record("solve", "other inputs") is None
        run.forget("solve")
        assert run.record("solve", "abc") is None


def test_other_configuration_is_refused_by_field(tmp_path):
    with RunFolder(config(tmp_path / "run")) as run:
        run.begin()
    with (
        pytest.raises(RunMismatchError, match=r"calibration\.windows: 32 in RUN, 9 now"),
        RunFolder(config(tmp_path / "run", **{"calibration.windows": 9})),
    ):
        pass


def test_a_run_that_never_began_binds_nothing(tmp_path):
    with RunFolder(config(tmp_path / "run", **{"model.path": "a typing mistake"})):
        pass  # its inputs were refused
    with RunFolder(config(tmp_path / "run")) as run:
        run.begin()


def test_what_was_refused_leaves_nothing_behind(tmp_path):
    """But what others have put there, and what was done before."""
    for path in (tmp_path / "new" / "run", tmp_path):
        with RunFolder(config(path)) as run:
            run.events.write_text("{}\n")
            run.finish("anything", "a", {})
        assert not os.listdir(tmp_path)
    with RunFolder(config(tmp_path / "new" / "run")) as run:
        run.tokens.write_text("packed")
    with RunFolder(config(tmp_path / "new" / "other")) as run:
        (run.path / "notes").write_text("x")
    assert run.path.is_dir()
    assert (tmp_path / "new" / "run" / ".lock").exists()
    with RunFolder(config(tmp_path / "new" / "run")) as run:
        run.begin()
    with pytest.raises(RunMismatchError), RunFolder(config(run.path, **{"calibration.seed": 1})):
        pass
    assert (run.path / ".lock").exists()


def test_a_moved_run_is_still_the_same(tmp_path):
    with RunFolder(config(tmp_path / "run")) as run:
        run.begin()
    (tmp_path / "run").rename(tmp_path / "moved")
    with RunFolder(config(tmp_path / "moved")):
        pass


def test_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="not empty"), RunFolder(config(tmp_path)):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunFolderError, match="run"), RunFolder(config(tmp_path / "run")):
        pass


def test_second_process_is_refused(tmp_path):
    code = (
        "import sys; from ghost_dist.config_file import load_config; "
        "from ghost_dist.run_folder import RunFolder\n"
        "with RunFolder(load_config(None, {'model.path': 'm', 'selection.remove': 3, "
        "'output.path': sys.argv[1]})):\n"
        "    print('held', flush=True); input()"
    )
    path = str(tmp_path / "run")
    holder = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunFolderError, match=f"process {holder.pid}"), RunFolder(config(path)):
            pass
        holder.kill()
    with RunFolder(config(path)):  # the lock dies with its holder
        pass


def test_half_written_record_means_not_done(tmp_path):
    with RunFolder(config(tmp_path / "run")) as run:
        run.begin()
        (run.path / "stages" / "solve.json").write_text('{"inputs": "abc", "outp')
        assert run.record("solve", "abc") is None


def test_what_killed_writers_left_is_removed(tmp_path):
    with RunFolder(config(tmp_path / "run")) as run:
        run.begin()
        for name in (".5-8.safetensors.ghost-partial", ".tmpA1b2C3", "5-8.safetensors"):
            (run.operators / name).touch()
    with RunFolder(config(tmp_path / "run")) as run:
        assert [path.name for path in run.operators.iterdir()] == ["5-8.safetensors"]


def test_not_a_run_folder(tmp_path):
    with pytest.raises(RunFolderError, match="not a RUN folder"):
        RunFolder.stored_config(tmp_path)


def test_read_only_place(tmp_path, monkeypatch):
    # Root may write anywhere, so the refusal of the file system is injected.
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with (
        pytest.raises(RunFolderError, match="Permission denied"),
        RunFolder(config(tmp_path / "r")),
    ):
        pass


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "must hold sections"),
        (b"[1, 2]", "must hold sections"),
        (b"model: {", "not valid YAML"),
        (b"\xff\xfe", "not valid YAML"),
        (b"services: {web: {image: nginx}}\n", "Unknown configuration key services"),
        (b"output: null\nmodel: {path: m}\nselection: 3\n", "selection: got 3"),
        (
            b"model: {path: m}\nselection: {remove: 3}\noperator: {foldz: 4}\n",
            "did you mean operator.folds",
        ),
    ],
)
def test_a_configuration_that_is_not_ours_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / "run"
    with RunFolder(config(path)) as run:
        run.begin()
    (path / "config.yaml").write_bytes(content)
    for use in (lambda: RunFolder.stored_config(path), RunFolder(config(path)).__enter__):
        with pytest.raises(RunFolderError, match=f"(?s)config.yaml.*{said}.*remove it and run"):
            use()
    (path / "config.yaml").unlink()  # as the message says
    with RunFolder(config(path)) as run:
        run.begin()
    assert RunFolder.stored_config(path) == config(path)
