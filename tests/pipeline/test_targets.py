"""Targets: how many layers they take, what the checkpoint comes to, what is predicted of them."""

import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, random_model
from rich.console import Console

from ghost_dist.amounts import parse_target
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.cli import _run_config
from ghost_dist.config import SelectionConfig
from ghost_dist.engines.model_sizes import model_sizes
from ghost_dist.errors import ConfigError
from ghost_dist.pipeline import layer_times, targets
from ghost_dist.pipeline.bench_serving import bench_serving
from ghost_dist.pipeline.inputs import open_inputs, open_model
from ghost_dist.pipeline.layer_times import Seconds
from ghost_dist.pipeline.recover import recover
from ghost_dist.pipeline.targets import Aim, amount_of, kv_numbers
from ghost_dist.pipeline.turns import Turn, cached
from ghost_dist.planning.plan import plan_run
from ghost_dist.progress import Reporter
from ghost_dist.report.page import write_report
from ghost_dist.report.terminal import print_serving

QUIET = Reporter(console=Console(quiet=True))
SEARCH = {
    "selection__spans": None,
    "selection__criterion": "search",
    "selection__effort": "quick",
    "operator__name": "auto",
}


def selection(**fields):
    return SelectionConfig(target="bytes 1GB", **fields)


def layers_and_spans(aim, **fields):
    found = amount_of(aim, selection(**fields))
    return found.layers, found.selection.max_spans


def test_the_fewest_layers_with_their_operators_and_the_spans_that_are_left():
    aim = Aim("bytes 1GB", [100] * 10, 30, 30, 1200, 800)  # 400 should go
    assert layers_and_spans(aim) == (5, 3)  # 500 - 3 x 30 = 410
    assert layers_and_spans(replace(aim, alone=100)) == (5, 3)
    assert layers_and_spans(replace(aim, alone=101)) == (6, 6)
    assert layers_and_spans(replace(aim, gap=0, alone=0)) == (4, None)
    assert layers_and_spans(aim, max_spans=1) == (5, 1)
    assert layers_and_spans(aim, max_spans=4) == (6, 4)  # 500 - 4 x 30 = 380
    assert layers_and_spans(aim, criterion="paper") == (5, None)


def test_shares_need_no_extra_layer_for_rounding():
    for layers in range(1, 32):
        total = 32 * 4_735_891
        aim = Aim("20%", [4_735_891] * 32, 0, 0, total, (1 - layers / 32) * total)
        assert layers_and_spans(aim) == (layers, None)


def test_layers_of_two_kinds():
    aim = Aim("bytes 1GB", [10, 10, 50, 50], 0, 0, 120, 60)
    assert layers_and_spans(aim, protect=(0,)) == (2, None)  # of 36.7 each
    assert layers_and_spans(aim, protect=(0,), criterion="paper") == (2, None)  # 10 and 50
    assert layers_and_spans(aim, criterion="paper") == (3, None)  # any three hold 60
    assert aim.given(100, 1) == 20


@pytest.mark.parametrize(
    ("wanted", "most", "said"),
    [
        ("speedup 4.5", 120, "3 of 4 layers may go, which gives 4.091 times at most"),
        ("kv 20%", 108, "24.4% at most"),
        ("90%", 54, "75.6% at most"),
        ("bytes 0.1kB", 100, "132.B at most"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_can(wanted, most, said):
    aim = Aim(wanted, [140] * 4, 12, 12, 540, most)
    with pytest.raises(ConfigError, match=said):
        amount_of(aim, selection())
    with pytest.raises(ConfigError, match="0 of 4 layers may go"):
        amount_of(aim, selection(protect=(0, 1, 2, 3)))
    with pytest.raises(ConfigError, match="as it is. Ask for less than that"):
        amount_of(replace(aim, most=540), selection())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_spans": 1, "protect": (4,)}, "selection.protect=[4], selection.max_spans=1"),
        (
            {"max_spans": 2, "protect": (1, 3, 5)},
            "selection.protect=[1, 3, 5], selection.max_spans=2",
        ),
        ({"criterion": "paper", "protect": (4,)}, "selection.protect=[4]"),
    ],
)
def test_bounds_that_contradict_a_target_are_named(fields, named):
    """Any of those that are named can be changed; others are not named."""
    aim = Aim("kv 40%", [100] * 10, 0, 0, 1000, 400)
    with pytest.raises(ConfigError) as refused:
        amount_of(aim, selection(**fields))
    assert str(refused.value) == (
        f"kv 40% takes 6 layers at least, and no such removal keeps to {named}. Change that, or "
        "ask for less."
    )


def test_more_layers_go_where_the_bounds_ask_for_more_gaps():
    aim = Aim("bytes 1GB", [100] * 20, 30, 30, 2200, 1800)  # 400 should go
    assert layers_and_spans(aim) == (5, 3)
    assert layers_and_spans(aim, protect=tuple(range(0, 20, 2))) == (6, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_layers_keep_is_what_the_cache_holds(checkpoint, family):
    source, architecture = checkpoint(family)
    model = random_model(family)
    with torch.inference_mode():
        tokens = torch.arange(3, 27)[None]
        cache = model(tokens, use_cache=True).past_key_values
    held = [cached(layer) / 4 for layer in cache.layers]
    kept = kv_numbers(source, architecture, 24)
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    # A sliding layer holds one token less: the next one is in its window.
    assert held == [n * (w - 1) / w if w else n for n, w in zip(kept, windows, strict=True)]
    assert any(kept)


def test_a_rotary_embedding_that_looks_at_the_length(checkpoint):
    source, architecture = checkpoint("phi3")
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    factors |= {"rope_theta": 1e4, "original_max_position_embeddings": 64}
    config = {**source.config, "rope_parameters": factors, "original_max_position_embeddings": 64}
    longer = replace(source, config=config)
    assert kv_numbers(longer, architecture, 24) == kv_numbers(source, architecture, 24)


def nbytes_of(folder):
    return sum(tensor.nbytes for tensor in open_checkpoint(folder).tensors.values())


@pytest.mark.parametrize("name", ["auto", "ghost"])  # of ghost, x and its norm: two matrices
@pytest.mark.parametrize("slack", [0, 1])
def test_the_checkpoint_meets_the_target(make_config, model_folder, tmp_path, name, slack):
    dense = nbytes_of(model_folder)
    sizes = model_sizes(*open_model(make_config())[:2], torch.float32)
    layer, operator = sizes.layers[0].stored_bytes, 4 * 48 * 48 * (1 + (name == "ghost"))
    alone = 4 * 48 * 48 * 2
    target = dense - 3 * layer + max(alone, 2 * operator) - slack
    config = make_config(
        **{**SEARCH, "operator__name": name, "operator__features": "auto"},
        selection__target=f"bytes {target}B",
    )
    inputs = open_inputs(config, QUIET)
    spans = 2 if not slack else (1 if operator < alone else None)
    spans = {("auto", 0): (3, 2), ("auto", 1): (4, 4), ("ghost", 0): (3, 2), ("ghost", 1): (3, 1)}
    assert (inputs.amount.layers, inputs.config.selection.max_spans) == spans[name, slack]
    result = recover(config, QUIET)
    assert nbytes_of(tmp_path / "run" / "checkpoint") == result["bytes"]["after"] <= target
    assert result["target"]["predicted"] <= target
    assert result["target"]["predicted"] >= result["bytes"]["after"]


def test_shares_and_bytes_are_net_of_operators(make_config, tmp_path):
    def removed(wanted):
        config = make_config(
            **SEARCH, selection__remove=wanted, output__path=str(tmp_path / wanted)
        )
        result = recover(config, QUIET)
        assert result["target"] is None
        before, after = result["parameters"].values()
        return (before - after) / before, result["bytes"]["before"] - result["bytes"]["after"]

    assert removed("25%")[0] >= 0.25
    assert removed("200kB")[1] >= 200_000


def test_a_search_frees_enough_of_two_kinds(checkpoint, make_config):
    source, _ = checkpoint("gemma3")  # layers 2 and 5 keep 128 tokens, the others 8
    config = make_config(
        **SEARCH, model__path=str(source.path), selection__target="kv 50%", selection__protect=[0]
    )
    _, _, amount = open_model(config)
    kept = amount.aim.frees
    assert kept == tuple(2 * 2 * 16 * n for n in (8, 8, 128, 8, 8, 128))
    rules = targets.rules_of(amount, 6)
    for removal in itertools.combinations(range(1, 6), amount.layers):
        left = 1 - sum(kept[layer] for layer in removal) / sum(kept)
        assert rules.allow(removal) == (left <= 0.5), removal


FULL_S, SLIDING_S, REST_S, STEP = 5.0, 2.0, 11.0, 0.125  # STEP: a decode step's part of a prefill


@pytest.mark.parametrize("part", ["", "prefill", "decode"])
@pytest.mark.parametrize("room", [math.inf, 4])
def test_seconds_of_layers_of_two_kinds(checkpoint, make_config, monkeypatch, part, room):
    """Made-up times of models come apart into those of their layers, also if some are left out."""
    source, architecture = checkpoint("gemma3")
    config = make_config(model__path=str(source.path))
    layers_seen = []

    def take_turns(models, ids_BT, new, rounds):
        assert ids_BT.shape == (1, 128 - new)  # the model has 128 positions
        turns = {}
        for name, model in models.items():
            types = model.config.layer_types
            layers_seen.append(len(types))
            assert model.lm_head.weight.shape[0] == architecture.vocab_size
            seconds = REST_S + sum(FULL_S if "full" in t else SLIDING_S for t in types)
            busy = [1, 3, 1, 1, 2]  # the machine, round by round
            turns[name] = [
                Turn(b * seconds, b * STEP * (new - 1) * seconds, ids_BT, None) for b in busy
            ]
        return turns

    monkeypatch.setattr(layer_times, "take_turns", take_turns)
    if room != math.inf:
        sizes = model_sizes(source, architecture, torch.float32)
        ends = sizes.below_bytes + sizes.head_bytes
        nbytes = 6 * (ends + (room + 0.5) * sizes.layers[0].loaded_bytes)
        monkeypatch.setattr(layer_times, "free_bytes", lambda _: nbytes)
    seconds = layer_times.request_seconds(config, source, architecture)[part]
    frees, total, product = seconds.layers, seconds.total, seconds.product
    factor = {"": 1 + 63 * STEP, "prefill": 1, "decode": 63 * STEP}[part]
    expected = [SLIDING_S, SLIDING_S, FULL_S] * 2
    assert frees == pytest.approx([factor * seconds for seconds in expected])
    assert total == pytest.approx(factor * (REST_S + sum(expected)))
    assert 0 < product < 1
    assert layers_seen[0] == (6 if room == math.inf else 4)

    monkeypatch.setattr(layer_times, "free_bytes", lambda _: 1000)
    with pytest.raises(ConfigError, match="two layers of each kind"):
        layer_times.request_seconds(config, source, architecture)


def test_a_speedup_is_measured_once_and_compared_with_what_comes(
    make_config, tmp_path, monkeypatch, capsys
):
    measured = [Seconds((1.0,) * 8, 10.0, 0.05)]
    monkeypatch.setattr(
        "ghost_dist.pipeline.recover.request_seconds",
        lambda *_: dict.fromkeys(("", "decode"), measured.pop()),
    )
    config = make_config(**SEARCH, selection__target="speedup 1.4 decode")
    result = recover(config, QUIET)  # 10 / (10 - 3 + 0.05 each) is 1.4085 with 2 gaps
    gone = sum(stop - start for start, stop in result["spans"])
    assert gone == 3
    assert result["target"] == {
        "target": "speedup 1.4 decode",
        "predicted": pytest.approx(10 / (7 + 0.05 * len(result["spans"]))),
    }
    assert result["target"]["predicted"] >= 1.4
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"predicted {result['target']['predicted']:.3f} times" in page
    assert recover(config, QUIET) == result  # nothing was left to pop
    served = bench_serving(tmp_path / "run", prompt=20, new=4, rounds=2)
    ratio = served["variants"]["recovered"]["decode"]["ratio"]
    low, high = served["variants"]["recovered"]["decode"]["ratio_range"]
    assert low < ratio < high  # of two rounds
    assert served["target"] == {**result["target"], "measured": ratio, "range": [low, high]}
    print_serving(served)
    said = f"predicted {result['target']['predicted']:.3f} times, measured {ratio:.3f} times "
    said += f"(rounds {low:.3f} to {high:.3f})"
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in write_report([tmp_path / "run"]).read_text()


def test_seconds_of_another_machine(make_config, tmp_path, monkeypatch, capsys):
    """What plan prints there counts here, where nothing is timed."""
    seconds = dict.fromkeys(("", "prefill", "decode"), Seconds((1.0,) * 8, 10.0, 0.05))
    monkeypatch.setattr(
        "ghost_dist.pipeline.recover.request_seconds", lambda *_: pytest.fail("timed here")
    )
    monkeypatch.chdir(tmp_path)
    config = make_config(**SEARCH, selection__target="speedup 1.4")
    with monkeypatch.context() as there:
        there.setattr(targets, "_times", lambda *_: seconds)
        Path("there.json").write_text(json.dumps(plan_run(config, QUIET).tree()))
    fields = {**SEARCH, "selection__target": "speedup 1.4"}
    here = make_config(**fields, selection__layer_times="there.json")
    spans = recover(here, QUIET, again="select")["spans"]
    assert sum(stop - start for start, stop in spans) == 3  # 10 / (10 - 3 + 0.05 each)
    monkeypatch.chdir("/")
    Path(tmp_path, "there.json").unlink()  # RUN has them
    kept = make_config(**fields, selection__layer_times=str(tmp_path / "there.json"))
    assert recover(kept, QUIET, again="select")["spans"] == spans
    other, of_two = tmp_path / "other.json", Seconds((1.0,) * 2, 4.0, 0.05)
    fields |= {"selection__layer_times": str(other), "output__path": str(tmp_path / "new")}
    for text, said in (
        (None, "FileNotFoundError"),
        ("[", "JSONDecodeError"),
        ('{"layer_times": null}', "TypeError"),
        (json.dumps({"layer_times": {part: asdict(of_two) for part in seconds}}), "of 2 layers"),
    ):
        if text is not None:
            other.write_text(text)
        with pytest.raises(ConfigError, match=f"selection.layer_times: .*other.json.*{said}"):
            recover(make_config(**fields), QUIET)
    assert not (tmp_path / "new").exists()


def test_a_share_of_the_cache_is_what_is_measured(make_config, tmp_path):
    config = make_config(**SEARCH, selection__target="kv 62.5%")
    assert "kv 62.5%: 3 layers go" in plan_run(config, QUIET).notes
    result = recover(config, QUIET)
    served = bench_serving(tmp_path / "run", prompt=20, new=4, rounds=1)
    assert served["target"] == {"target": "kv 62.5%", "predicted": 0.625, "measured": 0.625}
    assert result["target"]["predicted"] == 0.625


def test_targets_of_the_command_line():
    made = _run_config("m", [], {"speedup": "1.3 decode", "kv": None}, out="r")
    assert parse_target(made.selection.target) == ("speedup", 1.3, "decode")
    assert parse_target("bytes 20GB") == ("bytes", 20e9, "")
    assert parse_target("kv 60%") == ("kv", 0.6, "")
    with pytest.raises(ConfigError, match="speedup 1.3, kv 60%"):
        _run_config("m", [], {"speedup": "1.3", "kv": "60%"}, out="r")
    with pytest.raises(ConfigError, match="give one of them"):
        _run_config("m", [], {"kv": "60%"}, out="r", remove="3")
