"""Every operator through ``recover``; the exported checkpoint is reloaded by the run itself."""

import json
import statistics
from typing import Literal, get_args

import pytest
import torch
import transformers
from families import TEXT, save_checkpoint, save_tokenizer
from safetensors.torch import load_file

from ghost_dist import api
from ghost_dist.api import load_operator
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.config import Config, OperatorConfig, OperatorName
from ghost_dist.config_file import load_config
from ghost_dist.errors import ConfigError
from ghost_dist.pipeline import solving
from ghost_dist.pipeline.candidates import (
    Candidate,
    Tried,
    candidates_of,
    samples_of,
    strongest_ridge,
)
from ghost_dist.pipeline.compare import compare
from ghost_dist.pipeline.recover import recover, run_stage_again
from ghost_dist.report.terminal import print_run
from ghost_dist.ridge import RelativeRidge
from ghost_dist.solver.operators import OPERATORS, Operator
from ghost_dist.spans import Span

PLAIN = {"none", "fold"}


def operator_file(run, name="3-5"):
    return load_file(run / "operators" / f"{name}.safetensors")


def test_the_table_has_every_name_of_the_configuration():
    assert set(OPERATORS) == set(get_args(OperatorName))


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_exported_as_it_is_solved(make_config, text_file, tmp_path, name):
    config = make_config(
        operator__name=name,
        selection__spans=[[2, 3], [5, 7]],
        # Few tokens of a random model: what it is evaluated on is what it was fitted on.
        calibration__sampling="beginning",
        evaluation__corpora={"text": str(text_file)},
        evaluation__windows=4,
        evaluation__window_length=64,
    )
    result = recover(config)
    assert result["operator"] == name
    checkpoint = tmp_path / "run" / "checkpoint"
    family = json.loads((checkpoint / "config.json").read_text())["model_type"]
    assert family == ("llama" if name in PLAIN else "ghost_llama")
    perplexity = result["perplexity"]["text"]
    if name == "none":
        assert perplexity["recovered"] == perplexity["pruned"]
    else:
        assert perplexity["recovered"] < perplexity["pruned"]
        assert all(fit["residual"] < 1 for fit in result["fit"])
    added = 0 if name in PLAIN else 48 * 48
    layer = 48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 96 + 2 * 48
    parameters = result["parameters"]
    assert parameters["after"] == parameters["before"] - 3 * layer + 2 * added
    if name in PLAIN:  # loads without any code of ours
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        assert model.config.num_hidden_layers == 5


@pytest.fixture
def halfway(monkeypatch):
    """An operator added at run time: halfway between the plain cut and ghost."""

    def fit(*given, **options):
        repair, found = OPERATORS["ghost"].fit(*given, **options)
        weight_CC = repair.weight_CC
        return Repair(weight_CC=(weight_CC + torch.eye(len(weight_CC))) / 2), found

    field = OperatorConfig.model_fields["name"]
    with monkeypatch.context() as patch:
        patch.setattr(field, "annotation", field.annotation | Literal["halfway"])
        patch.setitem(OPERATORS, "halfway", Operator(fit))
        for section in (OperatorConfig, Config):
            section.model_rebuild(force=True)
        yield "halfway"
    for section in (OperatorConfig, Config):
        section.model_rebuild(force=True)


def test_an_operator_is_a_function_its_name_and_a_line_in_the_table(
    halfway, make_config, text_file, tmp_path
):
    """Fitted, exported, reloaded, evaluated, reported, priced and compared like the others."""
    evaluation = {
        "evaluation__corpora": {"text": str(text_file)},
        "evaluation__windows": 4,
        "evaluation__window_length": 64,
    }
    weights = {}
    for name in ("ghost", halfway):
        config = make_config(operator__name=name, output__path=str(tmp_path / name), **evaluation)
        result = recover(config)
        weights[name] = load_operator(tmp_path / name).weight_CC
    assert torch.equal(weights[halfway], (weights["ghost"] + torch.eye(48)) / 2)
    assert result["operator"] == halfway
    assert halfway in (tmp_path / halfway / "report.html").read_text()
    assert api.plan(config).tree()["stages"]
    shared = make_config(
        selection__spans=None, selection__remove=2, output__path=str(tmp_path / "all"), **evaluation
    )
    rows = compare(shared, [2], [halfway], ["paper"])["rows"]
    assert [row["operator"] for row in rows] == [halfway]
    assert rows[0]["perplexity"]["text"] > 0


def test_classes_that_contain_each_other_have_ordered_residuals(make_config, tmp_path):
    """ghost-joint leaves less than fold and than ghost, held out and not fitted away."""
    residual = {}
    for name in ("fold", "ghost", "ghost-joint"):
        config = make_config(
            operator__name=name, calibration__windows=160, output__path=str(tmp_path / name)
        )
        residual[name] = recover(config, again="solve")["fit"][0]["residual"]
    assert residual["ghost-joint"] < min(residual["ghost"], residual["fold"])
    assert max(residual["ghost"], residual["fold"]) < 1


@pytest.mark.parametrize(
    ("scores_of_the_stronger", "taken"),
    [
        ([0.9, 1.2, 1.0], 1),  # 0.03 worse on average, with a standard error of 0.09
        ([1.1, 1.2, 1.1], 2),  # worse on every piece
    ],
)
def test_a_stronger_ridge_that_is_as_good_is_taken(scores_of_the_stronger, taken):
    least = torch.ones(len(scores_of_the_stronger))
    scores = [least, torch.tensor(scores_of_the_stronger), least, least - 0.5]
    of_ghost = [Candidate("ghost", shift=shift) for shift in (1.0, 0.0, -1.0)]
    tried = list(map(Tried, [Candidate("fold", shift=2.0), *of_ghost]))
    for one, of_one in zip(tried, scores, strict=True):
        one.scores = of_one
    assert strongest_ridge(tried, tried[2]) is tried[taken]
    tried[1].row["failed"] = "why"
    assert strongest_ridge(tried, tried[2]) is tried[2]


def test_the_default_tries_ridges_and_features_and_takes_the_least_kl(make_config, tmp_path):
    config = make_config(
        operator__name="auto",
        operator__choose="kl",
        operator__features="auto",
        calibration__windows=32,
    )
    recover(config, again="solve")
    record = json.loads((tmp_path / "run" / "stages" / "solve.json").read_text())["outputs"]
    assert record["operator"] == "ghost-joint"
    table = record["candidates"]
    joint, fold, none, near = table[:4], table[4:8], table[8], table[9:]
    assert [row["operator"] for row in table] == [
        *["ghost-joint"] * 4, *["fold"] * 4, "none", *["ghost-joint"] * 2,
    ]  # fmt: skip
    for form in (joint, fold):
        for shift, row in zip((1, 0, -1, -2), form, strict=True):
            ratio = row["relative_ridge"][0] / form[1]["relative_ridge"][0]
            assert ratio == pytest.approx(10**shift)
    assert none["residual"] == none["relative_ridge"] == [None]
    assert none["kl"] > joint[1]["kl"]
    best = min(joint, key=lambda row: row["kl"])["relative_ridge"][0]
    assert [row["relative_ridge"][0] / best for row in near] == pytest.approx([10**0.5, 10**-0.5])
    [chosen] = [row for row in table if row["chosen"]]
    least = min(table, key=lambda row: row["kl"])

    def as_good(row):
        pairs = zip(row["left_out"], least["left_out"], strict=True)
        worse = [one["kl"] - other["kl"] for one, other in pairs]
        return statistics.mean(worse) <= statistics.stdev(worse) / len(worse) ** 0.5

    # What is far behind on the first piece is not judged on the others.
    whole = [row for row in (*joint, *near) if len(row["left_out"]) == len(least["left_out"])]
    stronger = [row for row in whole if as_good(row)]
    assert chosen == max(stronger, key=lambda row: row["relative_ridge"][0])
    assert set(operator_file(tmp_path / "run")) == {"linear", "down"}


def test_where_every_fit_does_harm_the_plain_cut_is_left(make_config, text_file, tmp_path, capsys):
    """As many tokens as regressors and next to no ridge; there is nothing to train then, either."""
    config = make_config(
        operator__name="auto",
        operator__choose="kl",
        operator__ridge={"relative": 1e-6},
        calibration__windows=4,
        calibration__window_length=48,
        calibration__sampling="beginning",
        refine__steps=2,
        evaluation__corpora={"text": str(text_file)},
        evaluation__windows=2,
        evaluation__window_length=64,
    )
    result = recover(config)
    assert [row["operator"] for row in result["candidates"]] == ["ghost-joint", "fold", "none"]
    assert [row["chosen"] for row in result["candidates"]] == [False, False, True]
    assert result["operator"] == "none"
    assert result["fit"] == []
    assert result["refine"] is None
    of_text = result["perplexity"]["text"]
    assert of_text["recovered"] == of_text["pruned"]
    assert (tmp_path / "run" / "report.html").exists()
    print_run(tmp_path / "run")
    assert "No operator is better than the plain cut" in capsys.readouterr().out


def test_residual_as_the_judge_runs_no_model(make_config, tmp_path, monkeypatch):
    def forbidden(*_args, **_kwargs):
        raise AssertionError("choose=residual needs statistics only")

    config = make_config(operator__features="auto")
    recover(config, again="calibrate")
    monkeypatch.setattr("ghost_dist.pipeline.offloading.open_causal_lm", forbidden)
    recover(config, again="solve")
    record = json.loads((tmp_path / "run" / "stages" / "solve.json").read_text())["outputs"]
    # stream and stream+norm
    assert [row["operator"] for row in record["candidates"]] == ["ghost", "ghost"]
    best = min(record["candidates"], key=lambda row: row["residual"][0])
    assert best["chosen"]


def test_sequential_refit_changes_the_later_span_only(make_config, tmp_path):
    def solved(name, **fields):
        config = make_config(
            selection__spans=[[1, 2], [4, 6]], output__path=str(tmp_path / name), **fields
        )
        recover(config, again="solve")
        return [operator_file(tmp_path / name, span)["linear"] for span in ("1-2", "4-6")]

    first, second = solved("parallel")
    same, other = solved("sequential", operator__refit="sequential")
    assert torch.equal(first, same)
    assert not torch.allclose(second, other, rtol=1e-3)
    # Before training the last fold is left out, whose windows change both.
    fewer = solved("trained", operator__refit="sequential", refine__steps=1)
    assert not any(map(torch.equal, (same, other), fewer))


def test_a_refit_is_taken_where_windows_that_no_fit_saw_say_so(make_config, tmp_path, monkeypatch):
    common = {"selection__spans": [[2, 3], [5, 6]], "operator__choose": "kl"}

    def solved(name, **fields):
        config = make_config(**common, **fields, output__path=str(tmp_path / name))
        recover(config, again="solve")
        record = json.loads((tmp_path / name / "stages" / "solve.json").read_text())["outputs"]
        return record["files"], record["refit"], record["folds"]

    explicit, parallel = (solved(n, operator__refit=n) for n in ("sequential", "parallel"))
    files, refit, folds = solved("auto")
    assert refit["kl_sequential"] + refit["standard_error"] < refit["kl_parallel"]
    assert (refit["taken"], files, folds) == (True, explicit[0], [0, 1, 2, 3])
    monkeypatch.setattr(solving, "REFIT_ERRORS", 1e6)
    files, refit, folds = solved("harder")
    assert (refit["taken"], files, folds) == (False, parallel[0], [0, 1, 2, 3])
    files, refit, _ = solved("few", calibration__windows=5)  # 6.7 tokens for each regressor
    assert refit is None


def test_refined_operators_are_what_is_exported_and_evaluated(make_config, text_file, tmp_path):
    fields = {
        "evaluation__corpora": {"text": str(text_file)},
        "evaluation__windows": 4,
        "evaluation__window_length": 64,
        "calibration__windows": 64,
        "refine__steps": 24,
        "refine__every": 8,
        "refine__learning_rate": 3e-4,
    }
    result = recover(make_config(**fields))
    losses = [look["loss"] for look in result["refine"]["losses"]]
    assert result["refine"]["improved"]
    assert min(losses) < losses[0]
    refined = load_file(tmp_path / "run" / "operators" / "refined" / "3-5.safetensors")["linear"]
    exported = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    torch.testing.assert_close(exported["model.layers.3.ghost.linear.weight"], refined.T.float())
    assert not torch.allclose(refined, operator_file(tmp_path / "run")["linear"], rtol=1e-4)
    before = recover(
        make_config(**{**fields, "refine__steps": 0, "output__path": str(tmp_path / "closed")})
    )
    assert before["refine"] is None
    assert result["perplexity"]["text"]["recovered"] != before["perplexity"]["text"]["recovered"]


def test_training_that_blows_up_leaves_the_closed_form_and_a_finished_run(make_config, tmp_path):
    fields = {"refine__steps": 4, "refine__every": 2, "refine__learning_rate": 1e37}
    result = recover(make_config(**fields))
    assert result["refine"]["losses"][-1]["loss"] is None
    assert not result["refine"]["improved"]
    closed = operator_file(tmp_path / "run")["linear"]
    exported = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    torch.testing.assert_close(exported["model.layers.3.ghost.linear.weight"], closed.T.float())
    assert recover(make_config(**fields)) == result
    assert not (tmp_path / "run" / "refine.pt").exists()


def test_statistics_that_lack_what_an_operator_needs(make_config, tmp_path):
    """The message's own command takes them; the refused change does not stay in the run."""
    run = tmp_path / "run"
    recover(make_config(), again="solve")
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="lack 3-5/joint.*ghost-dist calibrate"):
        run_stage_again(run, "solve", ["operator.name=fold"])
    assert (run / "config.yaml").read_bytes() == before
    run_stage_again(run, "calibrate", ["operator.name=fold"])
    assert run_stage_again(run, "solve", [])["operator"] == "fold"
    # Sums of [A, H] hold those of the stream: ghost needs no other pass.
    assert run_stage_again(run, "solve", ["operator.name=ghost"])["operator"] == "ghost"


SPANS, BOTH = (Span(2, 4), Span(6, 7)), frozenset(range(10))


def test_what_is_tried():
    def names(refittable=BOTH, spans=SPANS, **fields):
        config = OperatorConfig(**fields)
        return [(c.operator, c.features, c.shift) for c in candidates_of(config, spans, refittable)]

    shifts = (1, 0, -1, -2)
    joint = [("ghost-joint", "stream", d) for d in shifts]
    fold = [("fold", *rest) for _, *rest in joint]
    none = ("none", "stream", 0)
    assert names() == [*joint, *fold, none]
    assert names(name="ghost-joint") == joint
    assert names(name="fold") == fold
    assert names(choose="residual") == [joint[1], fold[1], none]
    assert names(ridge=RelativeRidge(relative=0.1)) == [joint[1], fold[1], none]
    ghosts = [("ghost", f, d) for f in ("stream", "stream+norm") for d in shifts]
    assert names(refittable=frozenset()) == [*ghosts, none]
    assert names(refittable=frozenset(), features="stream") == [*ghosts[:4], none]
    assert names(name="ghost") == ghosts
    assert names(name="none") == [none]


def test_sums_of_the_stream_are_not_taken_beside_those_they_follow_from():
    candidates = candidates_of(OperatorConfig(name="ghost-joint"), SPANS, BOTH)
    assert samples_of(candidates, SPANS, BOTH) == [(span, "joint") for span in SPANS]
    # Where a span has no layer to refit before it, ghost is fitted from the stream.
    first = (Span(0, 2), Span(4, 6))
    mixed = candidates_of(OperatorConfig(), first, BOTH)
    assert samples_of(mixed, first, BOTH) == [
        (Span(0, 2), "stream"), (Span(4, 6), "joint"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operator__name": "gost"}, "Did you mean ghost"),
        ({"selection__criterion": "papr"}, "Did you mean paper"),
        ({"operator__name": "auto", "operator__features": "stream+norm"}, "needs name=ghost"),
        ({"operator__affine": True}, "Unknown configuration key operator.affine"),
        ({"operator__choose": "kl", "operator__folds": 2}, "folds >= 3"),
        ({"refine__steps": 1, "operator__folds": 2}, "hold out one of 2.*folds >= 3"),
        ({"operator__name": "fold", "selection__spans": [[0, 2]]}, "needs a layer before"),
        ({"selection__max_spans": 2, "selection__criterion": "paper"}, "max_spans=2 needs"),
        ({"selection__remove": "7 layers", "selection__spans": None}, "give a number of layers"),
        (
            {"selection__remove": 2, "selection__spans": None, "selection__protect": [99]},
            r"names layers \[99\]",
        ),
    ],
)
def test_bad_input_says_what_to_do(make_config, fields, message):
    with pytest.raises(ConfigError, match=message):
        recover(make_config(**fields))


def test_a_norm_behind_the_mlp_is_refused_for_fold_and_ghost_is_the_default(tmp_path):
    model = tmp_path / "model"
    save_checkpoint("gemma2", model)
    save_tokenizer(model)
    (tmp_path / "text.txt").write_text(TEXT)

    def config(name):
        return load_config(None, {
            "model.path": str(model), "calibration.source": str(tmp_path / "text.txt"),
            "calibration.windows": 16, "calibration.window_length": 64,
            "selection.spans": [[2, 4]], "operator.name": name, "engine.device": "cpu",
            "output.path": str(tmp_path / name),
        })  # fmt: skip

    with pytest.raises(ConfigError, match="refits the down_proj of layer 1.*norm or a scale"):
        recover(config("fold"))
    assert recover(config("auto"), again="solve")["operator"] == "ghost"
    tokens_WT = load_file(tmp_path / "auto" / "tokens.safetensors")["tokens"]
    assert (tokens_WT[:, 0] == 1).all(), "Gemma's windows begin with BOS"
