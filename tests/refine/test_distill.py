"""Distillation against plain autograd, losses of full logits, and itself without interruption."""

import contextlib
import io
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import CUTS, HIDDEN, REPAIR_KINDS, VOCAB, oracle_logits, random_repairs, random_tokens
from rich.console import Console

from ghost_dist.calibration.split import NotHeldOutError
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.config import RefineConfig
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.errors import ConfigError
from ghost_dist.evaluation import scores
from ghost_dist.progress import Reporter
from ghost_dist.refine.distill import _rows_of_step, _schedule, _Student, distill

CPU = torch.device("cpu")
TOKENS = random_tokens(rows=14, length=12)
HELD_OUT = [1, 6, 10]
plain_logits = oracle_logits.__wrapped__  # without its inference mode


class Quiet(Reporter):
    """Counts steps and looks; may be told to stop, as Ctrl-C would, at a look or at a step."""

    def __init__(self, look=None, step=None):
        super().__init__(None, Console(file=io.StringIO()))
        self.stop_at_look, self.stop_at_step = look, step
        self.looks, self.steps, self.first = [], 0, None

    def event(self, kind, **fields):
        if kind == "refine":
            self.looks.append(fields["step"])
            if fields["step"] == self.stop_at_look:
                raise KeyboardInterrupt

    @contextlib.contextmanager
    def stage(self, name, total, unit, done=0):
        self.first = done

        def advance(amount):
            self.steps += amount
            if self.first + self.steps == self.stop_at_step:
                raise KeyboardInterrupt

        yield advance


def identities(spans):
    return {span: Repair(torch.eye(HIDDEN, dtype=torch.float64)) for span in spans}


def run(model, architecture, spans, operators, folder, *, config=None, **arguments):
    given = {"steps": 24, "batch": 4, "learning_rate": 1e-2, "every": 6, **(config or {})}
    arguments = {"batch": 2, "fingerprint": "mine", "reporter": Quiet()} | arguments
    return distill(
        model,
        architecture,
        Variant(spans, operators),
        arguments.pop("tokens", TOKENS).numpy().astype(np.int32),
        arguments.pop("fitted_on", []),
        arguments.pop("held_out", HELD_OUT),
        RefineConfig(**given),
        state=folder / "refine.pt",
        **arguments,
    )


@torch.inference_mode()
def dense_logits(model, tokens):
    return torch.cat([model(row[None], use_cache=False).logits for row in tokens])


def loss_by_hand(model, architecture, spans, operators, tokens, dense_model=None):
    """Mean over all tokens from full logits; differentiable in the operators."""
    target = dense_logits(dense_model or model, tokens)
    got = plain_logits(model, architecture.layers, spans, operators, tokens)
    p, q = target.clone().double().softmax(-1), got.double().softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def same_operators(a, b):
    return a.keys() == b.keys() and all(
        a[span].parts().keys() == b[span].parts().keys()
        and all(torch.equal(part, b[span].parts()[name]) for name, part in a[span].parts().items())
        for span in a
    )


def test_training_lowers_the_held_out_loss(loaded, tmp_path):
    """From identities the loss falls; the one reported is that of the operators given back."""
    model, architecture = loaded("llama")
    spans = CUTS["two"]
    operators, before = identities(spans), dense_logits(model, TOKENS)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    config = {"batch": 16, "learning_rate": 3e-3}
    tokens = random_tokens(rows=64, length=24)
    refined = run(
        model, architecture, spans, operators, tmp_path, config=config, tokens=tokens, batch=8
    )
    assert torch.equal(dense_logits(model, TOKENS), before)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.grad is None
    assert same_operators(operators, identities(spans))
    losses = [row["loss"] for row in refined.losses]
    assert [row["step"] for row in refined.losses] == [0, 6, 12, 18, 24]
    assert refined.improved
    assert min(losses) < 0.9 * losses[0]
    assert all(
        part.dtype == torch.float64 for r in refined.operators.values() for part in [r.weight_CC]
    )
    for found, reported in ((operators, losses[0]), (refined.operators, min(losses))):
        expected = loss_by_hand(model, architecture, spans, found, tokens[HELD_OUT])
        assert reported == pytest.approx(float(expected), rel=1e-4)


GRADIENTS = [
    *(("llama", kind, cut) for kind in REPAIR_KINDS for cut in ("two", "last")),
    ("llama", "stream+norm", "first"),
    ("llama", "ghost-joint", "second"),
    ("llama", "stream+norm", "two"),
    ("llama", "fold", "two"),
    ("gpt_neox", "ghost-joint", "two"),
    ("opt", "ghost-joint", "two"),
    ("opt", "stream+norm", "last"),
    ("gemma3", "stream+norm", "middle"),
    ("mixtral", "stream+norm", "two"),
]


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(("family", "kind", "cut"), GRADIENTS)
def test_gradients(loaded, monkeypatch, family, kind, cut, pieces):
    """Skipped layers, the entry in the middle and the cut at the head leave the gradient alone."""
    model, architecture = loaded(family)
    spans = CUTS[cut]
    operators = random_repairs(kind, spans, architecture, torch.float64)
    if pieces:
        monkeypatch.setattr(scores, "_LOGITS_AT_ONCE", 5 * VOCAB)
    rows = TOKENS[:3]
    leaves = {
        span: {n: part.float().requires_grad_() for n, part in repair.parts().items()}
        for span, repair in operators.items()
    }
    by_hand = {
        span: Repair.from_parts(parts, operators[span].norm_eps) for span, parts in leaves.items()
    }
    expected = loss_by_hand(model, architecture, spans, by_hand, rows)
    expected.backward()
    student = _Student(LayerwiseModel(model, architecture), Variant(spans, operators))
    numpy_rows = rows.numpy().astype(np.int32)
    # In two parts, as a step of more windows than go through the model at once.
    total = sum(
        share * student.batch_loss(part, weight=share)
        for share, part in ((2 / 3, numpy_rows[:2]), (1 / 3, numpy_rows[2:]))
    )
    assert total == pytest.approx(float(expected.detach()), rel=1e-4)
    for span, parts in leaves.items():
        for name, leaf in parts.items():
            got, want = student._parts[span][name].grad, leaf.grad
            assert want.norm() > 0, (span, name)
            assert (got - want).norm() <= 1e-4 * want.norm(), (span, name)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_exact_closed_form_stays(loaded, tmp_path):
    """Where training can only do harm, what was solved comes back as it was."""
    model, architecture = loaded("llama")
    spans, operators = CUTS["middle"], identities(CUTS["middle"])
    for layer in model.model.layers[2:4]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    refined = run(model, architecture, spans, operators, tmp_path, config={})
    assert refined.losses[0]["loss"] == pytest.approx(0, abs=1e-9)
    assert len(refined.losses) == 5
    assert not refined.improved
    assert refined.operators.keys() == operators.keys()
    assert refined.operators[spans[0]] is operators[spans[0]]
    assert torch.equal(operators[spans[0]].weight_CC, torch.eye(HIDDEN).double())


def test_the_best_look_is_given_back_not_the_last(loaded, tmp_path):
    """The rate that overshoots makes later looks worse; the operators of the best one count."""
    model, architecture = loaded("llama")
    spans, operators = CUTS["middle"], identities(CUTS["middle"])
    config = {"learning_rate": 0.3, "every": 1, "steps": 12, "patience": 30}
    rough = {spans[0]: Repair(8 * operators[spans[0]].weight_CC)}
    refined = run(model, architecture, spans, rough, tmp_path, config=config)
    losses = [row["loss"] for row in refined.losses]
    assert refined.improved
    assert min(losses) < losses[0]
    assert losses.index(min(losses)) not in (0, len(losses) - 1), losses
    expected = loss_by_hand(model, architecture, spans, refined.operators, TOKENS[HELD_OUT])
    assert min(losses) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("kind", REPAIR_KINDS)
def test_every_form_comes_back_as_it_was_trained(loaded, tmp_path, kind):
    """The operators given back have the parts of the closed form and the loss that was noted."""
    model, architecture = loaded("llama")
    spans = CUTS["two"]
    given = {
        span: replace(repair, norm_eps=0.5)  # large enough to be missed
        for span, repair in random_repairs(kind, spans, architecture, torch.float64).items()
    }
    refined = run(model, architecture, spans, given, tmp_path, config={"steps": 4, "every": 4})
    assert refined.improved
    for span, repair in refined.operators.items():
        assert repair.norm_eps == 0.5
        shapes = {name: part.shape for name, part in given[span].parts().items()}
        assert {name: part.shape for name, part in repair.parts().items()} == shapes
    expected = loss_by_hand(model, architecture, spans, refined.operators, TOKENS[HELD_OUT])
    assert refined.losses[-1]["loss"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("stop_at", [None, 0, 3, 5])
def test_patience_counts_looks_since_the_best(loaded, tmp_path, monkeypatch, stop_at):
    """A better look starts the count anew, in a call that was stopped in between as well."""
    model, architecture = loaded("llama")
    spans = CUTS["middle"]
    script = [5.0, 6.0, 4.0, 4.5, 3.0, 3.5, 3.0, 2.0, 1.0]  # as good is not better
    original, looks = _Student.batch_loss, iter(script)

    def scripted(self, rows, *, weight=1.0, backward=True):
        if backward:
            return original(self, rows, weight=weight)
        return next(looks)

    monkeypatch.setattr(_Student, "batch_loss", scripted)
    config = {"every": 1, "steps": 20, "patience": 2}
    arguments = {"config": config, "batch": len(HELD_OUT)}
    if stop_at is not None:
        with pytest.raises(KeyboardInterrupt):
            run(
                model,
                architecture,
                spans,
                identities(spans),
                tmp_path,
                reporter=Quiet(look=stop_at),
                **arguments,
            )
    refined = run(model, architecture, spans, identities(spans), tmp_path, **arguments)
    assert [row["loss"] for row in refined.losses] == script[:7]
    assert refined.improved


@pytest.fixture
def undisturbed(loaded, tmp_path):
    """A call to be repeated, and what it gives if nothing stops it."""
    model, architecture = loaded("llama")
    spans = CUTS["two"]
    operators = random_repairs("ghost-joint", spans, architecture, torch.float64)

    def call(folder, **arguments):
        folder = tmp_path / folder
        folder.mkdir(exist_ok=True)
        return run(model, architecture, spans, operators, folder, **arguments)

    return call, call("undisturbed")


@pytest.mark.parametrize(
    ("stop", "continues_at"),
    [
        ({"look": 0}, 0),
        ({"look": 12}, 12),
        ({"look": 24}, 24),
        ({"step": 3}, 0),
        ({"step": 15}, 12),
    ],
)
def test_stopped_and_called_again(undisturbed, tmp_path, stop, continues_at):
    """Bit by bit what an undisturbed call gives, and only what is missing is done again."""
    call, expected = undisturbed
    with pytest.raises(KeyboardInterrupt):
        call("stopped", reporter=Quiet(**stop))
    again = Quiet()
    found = call("stopped", reporter=again)
    assert (again.first, again.steps) == (continues_at, 24 - continues_at)
    assert again.looks == [step for step in (0, 6, 12, 18, 24) if step > continues_at]
    assert found.losses == expected.losses
    assert found.improved == expected.improved
    assert same_operators(found.operators, expected.operators)


@pytest.mark.parametrize("damage", ["other", "truncated", "empty", "flipped bit"])
def test_a_state_that_cannot_be_used(undisturbed, tmp_path, damage):
    """The state of another distillation, or half a file, is as none."""
    call, expected = undisturbed
    with pytest.raises(KeyboardInterrupt):
        call(
            "stopped",
            reporter=Quiet(look=12),
            config={"learning_rate": 1e-3},
            fingerprint="other" if damage == "other" else "mine",
        )
    path = tmp_path / "stopped" / "refine.pt"
    content = path.read_bytes()
    half = len(content) // 2
    if damage == "flipped bit":
        path.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
    elif damage != "other":
        path.write_bytes(content[:half] if damage == "truncated" else b"")
    again = Quiet()
    found = call("stopped", reporter=again)
    assert again.steps == 24
    assert found.losses == expected.losses
    assert same_operators(found.operators, expected.operators)


def test_a_loss_that_is_not_finite_is_told_and_ends_it(loaded, tmp_path):
    model, architecture = loaded("llama")
    spans, reporter = CUTS["middle"], Quiet()
    broken = {span: Repair(torch.full((HIDDEN, HIDDEN), math.nan)) for span in spans}
    refined = run(model, architecture, spans, broken, tmp_path, reporter=reporter)
    assert (reporter.steps, reporter.looks, refined.improved) == (0, [0], False)
    assert "loss at step 0 is NaN or Inf" in reporter.console.file.getvalue()


@pytest.mark.parametrize("patience", [1, 3])
def test_patience(loaded, tmp_path, patience):
    """A rate that wrecks the operators stops after as many looks as were granted, for good."""
    model, architecture = loaded("llama")
    spans, operators = CUTS["middle"], identities(CUTS["middle"])
    config = {"learning_rate": 30.0, "every": 2, "steps": 40, "patience": patience}
    first = Quiet()
    refined = run(model, architecture, spans, operators, tmp_path, config=config, reporter=first)
    assert [row["step"] for row in refined.losses] == [2 * look for look in range(patience + 1)]
    assert first.steps == 2 * patience
    assert not refined.improved
    assert refined.operators[spans[0]] is operators[spans[0]]
    again = Quiet()
    found = run(model, architecture, spans, operators, tmp_path, config=config, reporter=again)
    assert (again.steps, again.looks) == (0, [])
    assert found.losses == refined.losses
    assert found.operators[spans[0]] is operators[spans[0]]


def test_bad_input(loaded, tmp_path):
    """What cannot be trained is said in words, and no state is left behind."""
    model, architecture = loaded("opt")
    spans = CUTS["middle"]
    with pytest.raises(ConfigError, match="plain cut has no operator"):
        run(model, architecture, spans, {spans[0]: Repair()}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_closed_form_that_has_seen_the_held_out_windows_is_refused(loaded, tmp_path):
    model, architecture = loaded("llama")
    spans = CUTS["middle"]
    with pytest.raises(NotHeldOutError, match=r"judged by \[6, 10\], which it was fitted on"):
        run(model, architecture, spans, identities(spans), tmp_path, fitted_on=range(5, 12))
    assert not list(tmp_path.iterdir())


def test_held_out_windows_are_not_trained_on(loaded, tmp_path, monkeypatch):
    """The loss that chooses must be of windows that no step has seen."""
    model, architecture = loaded("llama")
    spans, trained = CUTS["middle"], []
    original = _Student.batch_loss

    def noting(self, rows, *, weight=1.0, backward=True):
        if backward:
            trained.extend(map(tuple, rows.tolist()))
        return original(self, rows, weight=weight, backward=backward)

    monkeypatch.setattr(_Student, "batch_loss", noting)
    run(model, architecture, spans, identities(spans), tmp_path)
    rows = [tuple(row) for row in TOKENS.tolist()]
    assert set(trained) == {row for number, row in enumerate(rows) if number not in HELD_OUT}
    assert len(trained) == 24 * 4


def test_windows_that_go_through_together(loaded, tmp_path):
    """Memory decides how many windows run at once, in unequal parts too; the training does not."""
    model, architecture = loaded("llama")
    spans, found = CUTS["middle"], {}
    for batch in (1, 3, 4):
        folder = tmp_path / str(batch)
        folder.mkdir()
        refined = run(model, architecture, spans, identities(spans), folder, batch=batch)
        found[batch] = [row["loss"] for row in refined.losses]
    assert len(set(found[4])) == 5
    assert found[1] == pytest.approx(found[4], rel=1e-3)
    assert found[3] == pytest.approx(found[4], rel=1e-3)


def test_order_of_windows_and_learning_rate():
    """Each epoch shows every window at most once, in another order; the rate goes up, then to 0."""
    training = list(range(100, 112))
    epochs = [
        [_rows_of_step(training, 4, step) for step in range(3 * e, 3 * e + 3)] for e in (0, 1)
    ]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == training
    assert epochs[0] != epochs[1]
    assert sorted(_rows_of_step(training, 50, 7)) == training
    rates = [_schedule(step, 200) for step in range(200)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert rates[6] == pytest.approx(1)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[6:]))
    assert rates[103] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3
    assert all(math.isfinite(_schedule(step, steps)) for steps in (1, 2) for step in range(steps))
