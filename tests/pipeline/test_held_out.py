"""Figures called held out, on a text whose folds are unrelated noise: other noise gives the same.

Each fold has tokens of its own, drawn at random. Whoever judges by a fold that something was fitted
on, or that went through a model with something fitted on it, claims far less than fresh noise, of
tokens that no fold has, shows.
"""

import json
import random

import numpy as np
import pytest
import torch
from families import oracle
from safetensors.torch import load_file

from ghost_dist.calibration.split import NotHeldOutError, check_held_out
from ghost_dist.calibration.windows import build_windows
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.evaluation.scores import window_scores
from ghost_dist.pipeline.candidates import Candidate
from ghost_dist.pipeline.inputs import open_causal_lm, open_inputs
from ghost_dist.pipeline.recover import recover
from ghost_dist.pipeline.solving import Solver
from ghost_dist.pipeline.stages import Stages
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import RunFolder

WINDOWS, LENGTH, FOLDS, FRESH = 16, 32, 4, 6
DEFAULTS = {"operator__name": "auto", "operator__features": "auto", "operator__choose": "kl"}


def noise(kind, characters, rng):
    """Characters of one kind: two bytes, hence two tokens, each, and no other kind has either."""
    return "".join(chr(0x80 + (64 + 6) * kind + rng.randrange(6)) for _ in range(characters))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two pieces of every fold in turn, as ranges are dealt."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("noise") / "text.txt"
    characters = WINDOWS * LENGTH // (2 * FOLDS) // 2
    path.write_text("".join(noise(piece % FOLDS, characters, rng) for piece in range(2 * FOLDS)))
    return path


@pytest.fixture
def noisy(make_config, text):
    """Function from fields to the configuration of a run on the noise."""

    def make(**fields):
        return make_config(
            calibration__source=str(text),
            calibration__sampling="beginning",  # whole, in its order
            calibration__windows=WINDOWS,
            calibration__window_length=LENGTH,
            **fields,
        )

    return make


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Function from a run's inputs to windows of noise, each of a kind of its own."""
    rng, path = random.Random(1), tmp_path_factory.mktemp("fresh") / "text.txt"
    path.write_text("".join(noise(FOLDS + i, LENGTH // 2, rng) for i in range(FRESH)))

    def windows(inputs):
        built = build_windows(
            str(path), inputs.tokenizer, windows=FRESH, window_length=LENGTH, seed=None,
            special_tokens=False, window_bos=False, vocab_size=inputs.architecture.vocab_size,
        )  # fmt: skip
        return built.tokens

    return windows


def opened(config):
    """Inputs, tokens, spans and store of a run that is calibrated."""
    reporter = Reporter()
    inputs = open_inputs(config, reporter)
    with RunFolder(config) as run:
        stages = Stages(inputs, run, reporter)
        tokens = stages.tokens()
        run.begin()
        spans = stages.select(tokens)
        return inputs, tokens, spans, stages.calibrate(tokens, spans)


def record(run, stage="solve"):
    return json.loads((run / "stages" / f"{stage}.json").read_text())["outputs"]


def solution(run, spans):
    """Operators of a run, from its files."""
    folder = run / "operators"
    return {
        span: Repair.from_parts(load_file(folder / f"{span.start}-{span.stop}.safetensors"))
        if (folder / f"{span.start}-{span.stop}.safetensors").exists()
        else Repair()
        for span in spans
    }


@torch.inference_mode()
def streams(model, architecture, boundary, tokens):
    """What enters a layer, or the final norm, of the model as it is now."""
    layers, seen = model.get_submodule(architecture.layers), []
    last = boundary == len(layers)
    module = model.get_submodule(architecture.final_norm) if last else layers[boundary]
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()),
        with_kwargs=True,
    )
    try:
        model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False)
    finally:
        handle.remove()
    return seen[0].double()


def residual(model, architecture, tokens, boundary, before, after):
    """||Y - X'||^2 over ||Y - X||^2 at a boundary; before and after: spans, operators."""
    dense = streams(model, architecture, boundary, tokens)
    errors = []
    for spans, operators in (before, after):
        with oracle(model, architecture.layers, spans, operators):
            found = streams(model, architecture, boundary, tokens)
        errors.append((found - dense).square().sum())
    return float(errors[1] / errors[0])


def divergences(model, architecture, spans, candidates, tokens):
    variants = [Variant(), *(Variant(spans, candidate) for candidate in candidates)]
    _, *found = window_scores(LayerwiseModel(model, architecture), variants, tokens, batch=8)
    return [one.kl.mean() for one in found]


def test_the_text_is_what_the_tests_say(noisy, fresh):
    inputs, tokens, _, store = opened(noisy())
    assert tokens.num_windows == WINDOWS
    fold_tokens = [
        set(tokens.tokens[list(windows)].flatten().tolist()) for windows in store.plan.ranges
    ]
    kinds = [*fold_tokens, *(set(row.tolist()) for row in fresh(inputs))]
    assert sum(map(len, kinds)) == len(set.union(*kinds)) == 7 * (FOLDS + FRESH)


def test_the_choice_claims_what_other_noise_shows(noisy, fresh, tmp_path):
    config = noisy(**DEFAULTS)
    recover(config, again="solve")
    inputs, _, spans, _ = opened(config)
    model = open_causal_lm(inputs)
    operators = solution(tmp_path / "run", spans)
    tokens = fresh(inputs)
    kl, cut = divergences(model, inputs.architecture, spans, [operators, {}], tokens)
    solved = record(tmp_path / "run")
    [chosen] = [row for row in solved["candidates"] if row["chosen"]]
    [plain] = [row for row in solved["candidates"] if row["operator"] == "none"]
    assert chosen["kl"] / plain["kl"] > 0.8 * kl / cut
    true = residual(model, inputs.architecture, tokens, 5, (spans, {}), (spans, operators))
    assert solved["fits"][0]["residual"] > 0.8 * true


def test_a_sequential_refit_claims_what_other_noise_shows(noisy, fresh, tmp_path):
    config = noisy(
        selection__spans=[[1, 2], [4, 6]],
        operator__name="ghost-joint",
        operator__refit="sequential",
    )
    recover(config, again="solve")
    inputs, _, spans, _ = opened(config)
    model, tokens = open_causal_lm(inputs), fresh(inputs)
    operators = solution(tmp_path / "run", spans)
    first, second = spans
    cut = {first: operators[first], second: Repair()}
    true = residual(
        model, inputs.architecture, tokens, second.stop, (spans, cut), (spans, operators)
    )
    assert record(tmp_path / "run")["fits"][1]["residual"] > 0.8 * true


def test_training_begins_with_what_other_noise_shows(noisy, fresh, tmp_path):
    """The closed form that training has to beat has not seen the windows it is looked at on."""
    config = noisy(operator__name="ghost-joint", refine__steps=1, refine__every=1)
    recover(config)
    inputs, _, spans, _ = opened(config)
    model = open_causal_lm(inputs)
    operators = solution(tmp_path / "run", spans)
    assert record(tmp_path / "run")["folds"] == [0, 1, 2]
    [kl] = divergences(model, inputs.architecture, spans, [operators], fresh(inputs))
    assert record(tmp_path / "run", "refine")["losses"][0]["loss"] > 0.8 * kl


def test_a_candidate_is_not_judged_by_what_it_has_seen(noisy):
    inputs, tokens, spans, store = opened(noisy(operator__name="ghost-joint"))
    solver = Solver(inputs, spans, store, tokens, Reporter())
    candidate = Candidate("ghost-joint")
    others = solver.fit(candidate, spans[0], (0, 1, 2))
    everything = solver.fit(candidate, spans[0])
    assert others.folds == {0, 1, 2}
    assert everything.folds == {0, 1, 2, 3}
    assert solver._scores([{spans[0]: others}], [3])[1].kl.shape == (WINDOWS // FOLDS,)
    with pytest.raises(NotHeldOutError, match=r"A candidate at \[3, 5\) would be judged by \[3\]"):
        solver._scores([{spans[0]: others}, {spans[0]: everything}], [3])
    with pytest.raises(NotHeldOutError, match=r"The stream behind \[3, 5\)"):
        solver._walk({spans[0]: everything}, candidate)


def test_what_was_not_fitted_may_be_judged_by_all(noisy):
    inputs, tokens, spans, store = opened(noisy())
    plain = Solver(inputs, spans, store, tokens, Reporter()).fit(Candidate("none"), spans[0])
    assert plain.folds == set()
    check_held_out(plain.folds, range(FOLDS), "it")
    check_held_out([0, 1], [2], "it")
    with pytest.raises(NotHeldOutError, match=r"it would be judged by \[2, 3\]"):
        check_held_out([3, 2, 1], range(2, 5), "it")


def test_no_fold_is_kept_off_where_nothing_is_judged_behind_the_fit(noisy, tmp_path):
    """One span is not refitted; but training is to be judged."""
    recover(noisy(operator__name="ghost", operator__refit="sequential"), again="solve")
    solved = record(tmp_path / "run")
    assert solved["folds"] == [0, 1, 2, 3]
    assert solved["fits"][0]["num_tokens"] == WINDOWS * LENGTH
    config = noisy(operator__name="ghost", refine__steps=1, output__path=str(tmp_path / "other"))
    recover(config, again="solve")
    assert record(tmp_path / "other")["fits"][0]["num_tokens"] == WINDOWS * LENGTH * 3 // 4
