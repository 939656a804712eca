"""The Python interface on the shipped model: its doctests, and what it gives back."""

import doctest
import json

import pytest
import torch

import ghost_dist
from ghost_dist import api, config_file
from ghost_dist.assets.stdlib_text import CALIBRATION_MODULES, stdlib_text
from ghost_dist.demo import PICO
from ghost_dist.errors import ConfigError, RunFolderError
from ghost_dist.spans import Span

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the doctests have left a finished run."""
    folder = tmp_path_factory.mktemp("api")
    text = folder / "text.txt"
    text.write_text(stdlib_text(CALIBRATION_MODULES[:6]), encoding="utf-8")
    names = {**vars(api), "PICO": PICO, "folder": folder, "text": text, "torch": torch}
    runner = doctest.DocTestRunner()
    finder = doctest.DocTestFinder()
    found = [test for module in (api, config_file) for test in finder.find(module, globs=names)]
    examples = {test.name: test for test in found}
    # That of recover first: another reads its run.
    for name in sorted(examples, key=lambda name: name != "ghost_dist.api.recover"):
        runner.run(examples[name])
    assert runner.tries > 6
    assert runner.failures == 0
    return folder


def test_a_run_is_what_its_folder_says(folder):
    run = ghost_dist.load_run(folder / "RUN")
    assert isinstance(run, ghost_dist.RecoveredRun)
    assert run.result == json.loads((folder / "RUN" / "result.json").read_text())
    assert run.spans == (Span(5, 10),)
    assert run.perplexity == {}
    tokenizer, model = run.load_tokenizer(), run.load_model()
    tokens = tokenizer("def main", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=3, do_sample=False).shape[1] > 3


def test_the_operator_is_the_one_in_the_checkpoint(folder):
    run = ghost_dist.load_run(folder / "RUN")
    solved, weights = run.operator("5:10"), run.load_model(dtype=torch.float64).state_dict()
    [stored] = [w for name, w in weights.items() if name.endswith("linear.weight")]
    # transposed for nn.Linear, in the checkpoint's bfloat16
    assert torch.equal(stored, solved.weight_CC.T.bfloat16().double())
    for span in (None, (5, 10), [5, 10], Span(5, 10)):
        assert torch.equal(run.operator(span).weight_CC, solved.weight_CC)


def test_what_is_asked_wrongly_is_said(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"span=\(4, 10\) is not one of .* removed: \[5, 10\)"):
        ghost_dist.load_operator(folder / "RUN", (4, 10))
    with pytest.raises(RunFolderError, match="is not a RUN folder"):
        ghost_dist.load_run(tmp_path)
    with pytest.raises(ConfigError, match="did you mean calibration.windows"):
        ghost_dist.make_config("m", remove=7, out="RUN", settings={"calibration.window": 64})
    config = ghost_dist.make_config("m", remove=7, out="RUN")
    with pytest.raises(ConfigError, match="remove beside it"):
        ghost_dist.recover(config, remove=5)
    with pytest.raises(AttributeError, match="recovery"):
        ghost_dist.recovery  # noqa: B018


def test_an_unfinished_run_has_no_result(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "RUN", tmp_path / "RUN")
    (tmp_path / "RUN" / "result.json").unlink()
    with pytest.raises(RunFolderError, match="is not finished"):
        ghost_dist.load_run(tmp_path / "RUN")
    assert ghost_dist.load_operator(tmp_path / "RUN").weight_CC is not None
