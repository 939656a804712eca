"""``engine.experts`` through the whole run: the bits of a run that holds whole layers."""

import pytest
from children import child
from families import TEXT, save_checkpoint, save_tokenizer
from run_files import events, operators

from ghost_dist.config_file import decisive_tree
from ghost_dist.engines.expert_parts import SplitLayer
from ghost_dist.engines.offloaded import OffloadedModel
from ghost_dist.errors import UnsupportedArchitectureError
from ghost_dist.pipeline.recover import recover


@pytest.fixture
def of_mixture(make_config, tmp_path):
    """Configuration of a small run of a mixture of four experts."""
    source = save_checkpoint("deepseek_v3", tmp_path / "source")
    save_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def make(run, **overrides):
        return make_config(
            model__path=str(source),
            calibration__source=str(text),
            calibration__windows=8,
            calibration__window_length=32,
            output__path=str(tmp_path / run),
            **{"selection__spans": [[2, 4]], **overrides},
        )

    return make


@pytest.fixture
def parts(monkeypatch):
    """Experts of every part that was run, in order; those of small models are not among them."""
    seen, run_part = [], SplitLayer._run_part

    def watched(self, part, batch):
        if len(batch.index_NK) not in (16, 32):  # two windows of 16, or one
            seen.append(len(part))
        run_part(self, part, batch)

    monkeypatch.setattr(SplitLayer, "_run_part", watched)
    return seen


def test_a_run_in_parts_ends_as_a_resident_one(of_mixture, tmp_path, parts):
    results = {}
    fields = {
        "operator__choose": "kl",
        "selection__spans": None,
        "selection__remove": 2,
        "selection__criterion": "paper",
        "evaluation__corpora": {"a": str(tmp_path / "text.txt")},
        "evaluation__windows": 3,
        "evaluation__window_length": 24,
    }
    for name, engine in (
        ("resident", {"engine__kind": "resident"}),
        ("whole", {"engine__kind": "streaming"}),
        ("parts", {"engine__kind": "streaming", "engine__experts": 3}),
    ):
        assert not parts
        results[name] = recover(of_mixture(name, **fields, **engine))
    assert set(parts) == {1, 3}
    assert operators(tmp_path / "parts") == operators(tmp_path / "resident")
    for name in ("config.json", "model.safetensors"):
        folders = [tmp_path / name / "checkpoint" for name in ("resident", "parts")]
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    got, whole = results["parts"], results["whole"]
    for key in ("spans", "chosen", "perplexity", "agreement", "candidates"):
        assert got[key] == whole[key], key
    assert got["reload_max_abs_difference"] == whole["reload_max_abs_difference"]
    read = {}
    for name in ("whole", "parts"):
        rows = events(tmp_path / name, "layers-read")
        read[name] = {row["stage"]: row["bytes"] for row in rows}
    assert read["parts"] == read["whole"]
    assert read["parts"].keys() == {"select", "calibrate"}


@pytest.mark.parametrize(("stage", "last"), [("calibrate", [4]), ("solve", [6]), (None, [6, 4, 6])])
def test_every_stage_holds_few_experts(of_mixture, tmp_path, monkeypatch, stage, last):
    """Calibration below the span, the choice by KL, the check of the export, evaluation."""
    held, hold = [], OffloadedModel.hold

    def watched(self, experts, **sizes):
        found = hold(self, experts, **sizes)
        held.append((experts, found.experts, self.num_layers))
        return found

    monkeypatch.setattr(OffloadedModel, "hold", watched)
    fields = {
        "engine__kind": "streaming",
        "engine__experts": 2,
        "operator__choose": "kl",
        "operator__ridge": "auto",
        "evaluation__corpora": {"a": str(tmp_path / "text.txt")},
        "evaluation__windows": 2,
        "evaluation__window_length": 24,
    }
    recover(of_mixture("run", **fields), again=stage)
    assert {(experts, found) for experts, found, _ in held} == {(2, 2)}
    layers = [count for _, _, count in held if count != 2]  # of the small model
    assert layers[0] == 4
    assert layers[-len(last) :] == last


@pytest.mark.parametrize("experts", ["auto", 3])
def test_a_process_that_knows_nothing_of_the_family(of_mixture, tmp_path, experts):
    """Here other tests have run its layers; a user's process begins with the streaming engine."""
    config = of_mixture("run", engine__kind="streaming", engine__experts=experts)
    log = tmp_path / "log.txt"
    process = child(config, log, "calibrate")
    process.start()
    process.join()
    assert process.exitcode == 0, log.read_text()


def test_a_run_goes_on_with_other_parts(of_mixture, tmp_path):
    fields = {"engine__kind": "streaming"}
    first = of_mixture("run", **fields, engine__experts=1)
    recover(first, again="calibrate")
    other = of_mixture("run", **fields, engine__experts=3)
    assert decisive_tree(first) == decisive_tree(other)
    written = (tmp_path / "run" / "stages" / "calibrate.json").read_bytes()
    recover(other)
    assert (tmp_path / "run" / "stages" / "calibrate.json").read_bytes() == written


def test_a_run_of_a_family_that_cannot_be_split_is_refused(of_mixture, monkeypatch):
    from ghost_dist.engines import layerwise

    found = layerwise.routed_experts

    def other(layer):
        experts = found(layer)
        return experts and experts.__class__(experts.path, experts.count, experts.parameters, "why")

    monkeypatch.setattr(layerwise, "routed_experts", other)
    with pytest.raises(UnsupportedArchitectureError, match=r"Family deepseek_v3: .*\(why\)"):
        recover(of_mixture("run", engine__kind="streaming", engine__experts=2))
