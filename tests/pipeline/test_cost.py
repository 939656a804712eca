"""What stages say that they do against what real runs do: counted, not timed."""

from pathlib import Path

import pytest
import torch
from families import TEXT, save_checkpoint, save_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

from ghost_dist.pipeline import solving
from ghost_dist.pipeline.candidates import searches_ridge
from ghost_dist.pipeline.engine import costs_of, shape_of
from ghost_dist.pipeline.inputs import open_inputs
from ghost_dist.pipeline.recover import recover
from ghost_dist.planning.plan import _open
from ghost_dist.progress import Reporter
from ghost_dist.solver import least_squares
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import SpanCollector, moments_bytes, moments_flops
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.sums import ColumnBlock

CPU = torch.device("cpu")
LENGTH = 64


def counting():
    """Torch's own counter, told that adding a product in place is a product."""

    def in_place(total, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})


def planned_costs(config):
    run = shape_of(_open(config)[0])
    return run, costs_of(run)


@pytest.fixture
def counted(monkeypatch):
    """Tokens times layers of whole windows, and Cholesky factors of fits."""
    counts = {"tokens": 0, "factors": 0}
    forward, factor = LlamaDecoderLayer.forward, least_squares.cholesky_factor

    def count_tokens(self, hidden_states, *arguments, **options):
        if hidden_states.shape[1] == LENGTH:  # shorter ones are trials
            counts["tokens"] += hidden_states.shape[0] * hidden_states.shape[1]
        return forward(self, hidden_states, *arguments, **options)

    def count_factors(*arguments):
        counts["factors"] += 1
        return factor(*arguments)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", count_tokens)
    monkeypatch.setattr(least_squares, "cholesky_factor", count_factors)

    def stage(config, name):
        counts.update(tokens=0, factors=0)
        recover(config, again=name)
        return dict(counts)

    return stage


DEFAULTS = {"operator__name": "auto", "operator__features": "auto", "operator__choose": "kl"}
RUNS = {
    "ghost": {},
    "ghost by kl": {"operator__choose": "kl"},
    "ghost, a ridge given": {"operator__ridge": {"relative": 0.1}},
    "stream+norm": {"operator__features": "auto", "operator__choose": "kl"},
    "defaults": DEFAULTS,
    "defaults, three judges": {**DEFAULTS, "calibration__windows": 64, "operator__folds": 3},
    "joint": {"operator__name": "ghost-joint"},
    "two spans": {**DEFAULTS, "selection__spans": [[2, 3], [5, 7]]},
    "cut only": {"operator__name": "none"},
    "two spans of ghost by kl": {
        "operator__choose": "kl",
        "selection__spans": [[2, 3], [5, 7]],
    },
    "sequential": {"selection__spans": [[2, 3], [5, 7]], "operator__refit": "sequential"},
    "all": {
        **DEFAULTS,
        "selection__spans": [[1, 2], [4, 5]],
        "operator__refit": "sequential",
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_layers_and_fits_are_counted_as_the_stages_run_them(
    make_config, counted, monkeypatch, name
):
    """What is dropped is not known before: other operators than the first are supposed to be."""

    def of_first(tried, *_):
        names = (tried[0].candidate.operator, "none")
        return [one for one in tried if one.candidate.operator in names]

    monkeypatch.setattr(solving, "not_far_behind", of_first)
    config = make_config(**RUNS[name])
    run, costs = planned_costs(config)
    for stage in ("calibrate", "solve"):
        found = counted(config, stage)
        assert costs[stage].layers.total() == found["tokens"], stage
    # The errors of candidates whose ridge is one of the grid are known by then.
    reckoned = sum(fit.steps for fit in costs["solve"].fits)
    tried = len(config.left_out) * len(run.candidates) * len(run.spans)
    saved = ((config.folds - 1) * tried + 4 * config.folds) * searches_ridge(config.operator)
    assert reckoned - saved <= found["factors"] <= reckoned


def test_the_papers_score_runs_every_layer_once(make_config, counted):
    config = make_config(selection__spans=None, selection__remove=2)
    run, costs = planned_costs(config)
    found = counted(config, "select")
    assert costs["select"].layers.total() == found["tokens"] == run.num_tokens * run.num_layers


def test_evaluation_and_export(make_config, text_file, counted):
    config = make_config(
        evaluation__corpora={"a": str(text_file), "b": str(text_file)},
        evaluation__windows=5,
        evaluation__window_length=LENGTH,
    )
    _, costs = planned_costs(config)
    recover(config, again="solve")
    found = counted(config, "evaluate")
    evaluated = costs["evaluate"].layers.total()
    verified = 2 * LENGTH * 6  # the export runs two windows here, and two elsewhere
    assert evaluated + verified == found["tokens"]
    # Layers [3, 5) go; behind layer 3 the cut models run on what the dense one computed.
    assert evaluated == 2 * 5 * LENGTH * (8 + 3 + 3)
    assert costs["evaluate"].scored == 3 * 2 * 5 * LENGTH


def test_all_windows_of_a_corpus_are_counted(make_config, text_file):
    config = make_config(
        evaluation__corpora={"a": str(text_file)}, evaluation__window_length=LENGTH
    )
    planned = _open(config)[0].evaluation["a"].tokens.shape
    assert planned == open_inputs(config, Reporter()).evaluation["a"].tokens.shape


@pytest.mark.parametrize("operator", ["ghost", "ghost-joint"])
def test_stored_bytes_are_those_of_a_written_store(make_config, operator):
    config = make_config(operator__name=operator)
    _, costs = planned_costs(config)
    cost = costs["calibrate"]
    recover(config, again="calibrate")
    store = StatisticsStore.open(Path(config.output.path) / "statistics.zarr")
    arrays = store.total()
    nbytes = sum(a.nbytes for sums in arrays.values() for a in sums.arrays().values())
    assert cost.sums_bytes == nbytes
    # C is 48: a gram of fewer rows than a strip is stored whole.
    assert cost.commit_bytes == nbytes * len(store.plan.ranges)
    on_disk = sum(
        path.stat().st_size for path in (store.path / "ranges").rglob("*") if path.is_file()
    )
    assert cost.commit_bytes == pytest.approx(on_disk, rel=0.2)


@pytest.mark.parametrize(("z", "c"), [(48, 48), (5000, 64), (9000, 32)])
def test_flops_of_moments_are_those_that_torch_counts(z, c):
    collector = SpanCollector([(Span(1, 2), "joint")], c, CPU, inner_size={0: z - c})
    stream_TC = torch.randn(16, c)
    with counting() as counter:
        collector.take_mlp(0, 0, torch.randn(16, z - c), stream_TC)
        collector(1, 0, stream_TC)
        collector(2, 0, stream_TC)
    products = counter.get_total_flops()
    assert products == 16 * moments_flops(z, c)
    sums = collector.result()["1-2/joint"]
    assert moments_bytes("joint", c, z - c) == sum(a.nbytes for a in sums.arrays().values())


@pytest.mark.parametrize("blocks", [2, 3])
def test_ranks_share_the_products_without_symmetry(blocks):
    z = c = 48
    flops = 0
    for index in range(blocks):
        block = ColumnBlock(index, blocks)
        collector = SpanCollector([(Span(1, 2), "stream")], c, CPU, block=block)
        with counting() as counter:
            collector(1, 0, torch.randn(16, c))
            collector(2, 0, torch.randn(16, c))
        flops += counter.get_total_flops()
    assert flops == 16 * 2 * (z * z + z * c)


def test_layers_in_parts_run_twice_but_for_their_experts(make_config, tmp_path, monkeypatch):
    source = save_checkpoint("mixtral", tmp_path / "source")
    save_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    config = make_config(
        model__path=str(source),
        calibration__source=str(text),
        engine__kind="streaming",
        engine__experts=3,
        selection__spans=[[2, 4]],
    )
    ran, forward = [], MixtralAttention.forward

    def counted(self, hidden_states, *arguments, **options):
        if hidden_states.shape[1] == LENGTH:  # shorter ones are trials
            ran.append(hidden_states.shape[0] * hidden_states.shape[1])
        return forward(self, hidden_states, *arguments, **options)

    monkeypatch.setattr(MixtralAttention, "forward", counted)
    recover(config, again="calibrate")
    run, costs = planned_costs(config)
    flops = {n: costs["calibrate"].flops(run.sizes, n) for n in (None, 3, 4)}
    assert sum(ran) == 2 * 4 * run.num_tokens
    shape = run.inputs.source.config
    c, heads = shape["hidden_size"], shape["num_attention_heads"]
    head_dim, keys = c // heads, shape["num_key_value_heads"]
    projections = 2 * c * head_dim * (2 * heads + 2 * keys)
    rest = projections + 2 * c * shape["num_local_experts"] + 4 * heads * head_dim * LENGTH
    assert flops[3] - flops[None] == rest * sum(ran) / 2
    assert flops[4] == flops[None]
