"""The main job from a checkpoint to a recovered checkpoint, judged by its outputs."""

import json
import shutil

import pytest
import torch
import transformers
from rotating import write_rotating_model
from run_files import events, flip, operators
from safetensors.torch import load_file, save_file

from ghost_dist.config_file import config_tree, load_config
from ghost_dist.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    ExportError,
    RunFolderError,
    RunMismatchError,
)
from ghost_dist.evaluation.scores import NonFiniteLossError
from ghost_dist.export import rewrite
from ghost_dist.pipeline.evaluating import Evaluation
from ghost_dist.pipeline.recover import recover, run_stage_again
from ghost_dist.run_folder import RunFolder


@pytest.fixture(scope="module")
def finished_once(config_at, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, recover(config_at(folder))


@pytest.fixture
def finished(finished_once, tmp_path):
    """The run of ``make_config()``, done; its result."""
    shutil.copytree(finished_once[0], tmp_path / "run")
    return finished_once[1]


def logits(folder, tokens, **arguments):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **arguments
    )
    with torch.inference_mode():
        return model(tokens).logits


@pytest.mark.parametrize("span", [[0, 2], [1, 4]])
def test_exactly_linear_span_is_recovered_to_float32_accuracy(
    model_folder, make_config, tmp_path, span
):
    dense = tmp_path / "rotating"
    write_rotating_model(model_folder, dense, range(5))
    config = make_config(
        model__path=str(dense), selection__spans=[span], operator__ridge={"absolute": 1e-6}
    )
    result = recover(config)
    assert result["fit"][0]["residual"] < 1e-9
    tokens = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(3))
    expected = logits(dense, tokens)
    recovered = logits(tmp_path / "run" / "checkpoint", tokens, trust_remote_code=True)
    scale = expected.abs().max()
    assert (recovered - expected).abs().max() < 2e-5 * scale
    pruned = recover(
        make_config(
            model__path=str(dense),
            selection__spans=[span],
            operator__name="none",
            output__path=str(tmp_path / "cut"),
        )
    )
    assert pruned["fit"] == []
    # Without the operator the same cut is far off, so the agreement above is the operator's.
    assert (logits(tmp_path / "cut" / "checkpoint", tokens) - expected).abs().max() > 0.1 * scale


def test_result_has_the_documented_keys_and_true_figures(make_config, text_file, tmp_path):
    config = make_config(
        evaluation__corpora={"text": str(text_file)},
        evaluation__windows=4,
        evaluation__window_length=64,
    )
    result = recover(config)
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored == result
    assert json.loads((tmp_path / "run" / "checkpoint" / "result.json").read_text()) == result
    assert result["spans"] == [[3, 5]]
    assert result["operator"] == "ghost"
    assert len(result["ridge"]) == len(result["fit"]) == 1
    assert set(result["perplexity"]["text"]) == {"dense", "pruned", "recovered"}
    assert result["tokens"] == 16 * 64
    before, after = result["parameters"]["before"], result["parameters"]["after"]
    layer = 2 * (48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 96 + 2 * 48)
    assert after == before - layer + 48 * 48
    assert {"torch", "transformers", "ghost_dist"} <= set(result["versions"])
    assert result["peak_bytes"]["host"] > 0
    assert set(result["timings_s"]) == {
        "tokens", "select", "calibrate", "solve", "export", "evaluate",
    }  # fmt: skip
    assert len(events(tmp_path / "run", "range-committed")) == 4  # one per fold


def test_evaluated_perplexity_is_that_of_the_exported_checkpoint(make_config, text_file, tmp_path):
    config = make_config(
        evaluation__corpora={"text": str(text_file)},
        evaluation__windows=4,
        evaluation__window_length=64,
    )
    result = recover(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "run" / "checkpoint", trust_remote_code=True
    )
    ids = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"][: 4 * 64]
    tokens = torch.tensor(ids).view(4, 64)
    values = logits(tmp_path / "run" / "checkpoint", tokens, trust_remote_code=True)
    loss = torch.nn.functional.cross_entropy(
        values[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()
    )
    assert result["perplexity"]["text"]["recovered"] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_selection_finds_the_span_that_does_nothing(model_folder, make_config, tmp_path):
    dense = tmp_path / "idle"
    shutil.copytree(model_folder, dense)
    weights = load_file(dense / "model.safetensors")
    for name in weights:
        if name.startswith(("model.layers.4.", "model.layers.5.")) and name.endswith(
            ("o_proj.weight", "down_proj.weight")
        ):
            weights[name].zero_()
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    config = make_config(model__path=str(dense), selection__spans=None, selection__remove=2)
    assert recover(config)["spans"] == [[4, 6]]


def test_several_spans_also_at_both_ends(make_config, tmp_path):
    result = recover(make_config(selection__spans=[[0, 1], [3, 5], [7, 8]]))
    assert result["spans"] == [[0, 1], [3, 5], [7, 8]]
    assert sorted(operators(tmp_path / "run")) == [
        "0-1.safetensors", "3-5.safetensors", "7-8.safetensors",
    ]  # fmt: skip
    assert result["reload_max_abs_difference"] < 1e-4


def test_second_run_does_nothing_and_says_the_same(make_config, finished, tmp_path, capsys):
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "operators").iterdir()}
    assert recover(make_config()) == finished
    taken = "calibration text, sums of 4 of 4 ranges, operators, checkpoint"
    assert capsys.readouterr().err.count(f"taken from RUN: {taken}\n") == 1
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "operators").iterdir()} == files


def test_another_configuration_on_the_run_is_refused(make_config, finished, tmp_path):
    before = operators(tmp_path / "run")
    with pytest.raises(RunMismatchError, match=r"calibration\.windows: 16 in RUN, 8 now"):
        recover(make_config(calibration__windows=8))
    assert operators(tmp_path / "run") == before


def test_changed_weights_under_the_same_path_are_noticed(model_folder, make_config, tmp_path):
    dense = tmp_path / "model"
    shutil.copytree(model_folder, dense)
    recover(make_config(model__path=str(dense)), again="calibrate")
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunMismatchError, match="model"):
        recover(make_config(model__path=str(dense)))


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_batch_size_changes_the_operator_by_rounding_only(make_config, tmp_path, batch):
    recover(make_config(operator__ridge={"relative": 1e-4}), again="solve")
    other = tmp_path / "other"
    recover(
        make_config(
            operator__ridge={"relative": 1e-4}, engine__batch=batch, output__path=str(other)
        ),
        again="solve",
    )
    a = load_file(tmp_path / "run" / "operators" / "3-5.safetensors")["linear"]
    b = load_file(other / "operators" / "3-5.safetensors")["linear"]
    # float32 rounding of the streams (6e-8), amplified by at most the condition of a ridge of 1e-4.
    assert (a - b).abs().max() < 1e-4


def test_a_damaged_operator_is_solved_again(make_config, finished, tmp_path):
    before = operators(tmp_path / "run")
    flip(tmp_path / "run" / "operators" / "3-5.safetensors", -1)
    result = recover(make_config())
    assert operators(tmp_path / "run") == before
    assert any("is not the one" in e["message"] for e in events(tmp_path / "run", "warning"))
    assert result["spans"] == [[3, 5]]
    assert len(events(tmp_path / "run", "range-committed")) == 4  # nothing was run again


def test_damaged_statistics_are_repaired_by_running_that_range_again(
    make_config, finished, tmp_path
):
    before = operators(tmp_path / "run")
    [chunk] = (tmp_path / "run" / "statistics.zarr" / "ranges" / "00002").glob("*/0/packed/c/0")
    flip(chunk, 100, bit=4)
    (tmp_path / "run" / "operators" / "3-5.safetensors").unlink()
    recover(make_config(), again="solve")
    assert operators(tmp_path / "run") == before
    told = (tmp_path / "run" / "events.jsonl").read_text()
    assert told.count("range-committed") == 4 + 1
    assert told.partition("warning")[2].count("range-committed") == 1


def test_lost_checkpoint_is_written_again(make_config, finished, tmp_path, capsys):
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    recover(make_config())
    told = capsys.readouterr().err.splitlines()
    taken = "taken from RUN: calibration text, sums of 4 of 4 ranges, operators"
    assert [line for line in told if "taken" in line] == [taken]
    assert told.index(taken) < next(n for n, line in enumerate(told) if "verify: " in line)
    assert (tmp_path / "run" / "checkpoint" / "config.json").exists()


def test_failed_export_leaves_nothing_that_looks_complete(make_config, tmp_path, monkeypatch):
    def fails(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    config, taken = make_config(export__max_shard_bytes=50_000), []
    monkeypatch.setattr(rewrite, "put_values", lambda path, _: taken.append(path.name))
    monkeypatch.setattr("ghost_dist.pipeline.exporting.verify_reload", fails)
    with pytest.raises(OSError, match="No space left"):
        recover(config)
    assert len(taken) > 1, "shards were copied ahead"
    run = tmp_path / "run"
    assert not (run / "checkpoint").exists()
    assert not list(run.glob("checkpoint*"))
    assert not (run / "result.json").exists()
    monkeypatch.undo()
    assert recover(config)["spans"] == [[3, 5]]
    assert {path.name for path in (run / "checkpoint").glob("*.safetensors")} > set(taken)


def test_a_disk_that_fails_behind_a_copy_is_told(make_config, tmp_path, monkeypatch):
    """The copy is forced to the disk by its own thread, whose error nobody would see otherwise."""
    pools = []

    def full(pool, path):
        pools.append(path)
        return pool.submit(lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))

    config = make_config(export__max_shard_bytes=50_000)
    monkeypatch.setattr("ghost_dist.pipeline.exporting.fsync_in", full)
    with pytest.raises(ExportError, match="No space left"):
        recover(config)
    assert len(pools) > 1
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_evaluation_beside_the_check_may_fail(make_config, text_file, tmp_path, monkeypatch):
    corpora = {"evaluation__corpora": {"a": str(text_file)}, "evaluation__window_length": 64}
    checked = []

    def fails(_):
        checked.append((tmp_path / "run" / "checkpoint").exists())
        raise NonFiniteLossError

    monkeypatch.setattr(Evaluation, "measure", fails)
    with pytest.raises(NonFiniteLossError):
        recover(make_config(**corpora))
    assert checked == [False, True]


def test_stage_again_with_another_ridge(finished, tmp_path):
    before = operators(tmp_path / "run")
    run_stage_again(tmp_path / "run", "solve", ["operator.ridge={relative: 0.7}"])
    assert operators(tmp_path / "run") != before
    config = RunFolder.stored_config(tmp_path / "run")
    assert config_tree(config)["operator"]["ridge"] == {"relative": 0.7}
    result = recover(config)  # export follows the new operator
    assert result["fit"][0]["relative_ridge"] == pytest.approx(0.7)
    exported = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    solved = load_file(tmp_path / "run" / "operators" / "3-5.safetensors")["linear"]
    [name] = [name for name in exported if "ghost" in name]
    assert torch.equal(exported[name], solved.T.float())


def test_stage_again_refuses_what_earlier_stages_depend_on(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"calibration\.windows cannot be changed with solve"):
        run_stage_again(tmp_path / "run", "solve", ["calibration.windows=4"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"selection.spans": [[3, 12]]}, ConfigError, "layers 0 to 7"),
        ({"selection.spans": [[0, 8]]}, ConfigError, "all 8 layers"),
        ({"selection.spans": None, "selection.remove": 8}, ConfigError, "give 1 to 7"),
        ({"calibration.windows": 100000}, CalibrationError, "100000"),
        ({"calibration.source": "nowhere/at-all.txt"}, CalibrationError, "at-all"),
        ({"calibration.windows": 3}, ConfigError, "folds=4"),
        ({"calibration.ranges": 2}, ConfigError, "folds=4"),
        ({"model.path": "nowhere/at-all"}, CheckpointError, "at-all"),
        ({"engine.device": "cuda:63"}, ConfigError, "cuda"),
    ],
)
def test_bad_input_is_refused_before_any_work(make_config, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        recover(make_config(**{key.replace(".", "__"): value for key, value in changes.items()}))
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert not list((tmp_path / "run").glob("statistics.zarr/ranges/*"))
    # Corrected under the same --out, it works.
    with RunFolder(make_config()):
        pass


def test_full_disk_is_refused_with_the_figures(make_config, monkeypatch):
    monkeypatch.setattr(
        "ghost_dist.pipeline.inputs.shutil.disk_usage",
        lambda _: shutil._ntuple_diskusage(100, 90, 10),
    )
    with pytest.raises(RunFolderError, match=r"Not enough disk space.*GB needed"):
        recover(make_config())


def test_operator_in_float32_on_a_bfloat16_checkpoint(model_folder, make_config, tmp_path):
    dense = tmp_path / "bf16"
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    model.save_pretrained(dense)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, dense)
    for dtype, expected in (("model", torch.bfloat16), ("float32", torch.float32)):
        run = tmp_path / dtype
        recover(make_config(model__path=str(dense), operator__dtype=dtype, output__path=str(run)))
        weights = load_file(run / "checkpoint" / "model.safetensors")
        [name] = [name for name in weights if "ghost" in name]
        assert weights[name].dtype == expected
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            run / "checkpoint", trust_remote_code=True
        )
        assert loaded.get_parameter(name).dtype == expected


def test_yaml_file_is_the_same_run(make_config, tmp_path):
    config = make_config()
    recover(config, again="solve")
    assert load_config(tmp_path / "run" / "config.yaml", {}) == config
