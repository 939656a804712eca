"""The plan of a run, from headers alone: what it prints, and what it refuses."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
from headers_only import write_headers

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.cli import main
from ghost_dist.config_file import load_config
from ghost_dist.engines.layerwise import adds_mlp_output
from ghost_dist.engines.memory import EngineChoice
from ghost_dist.engines.model_sizes import model_sizes
from ghost_dist.engines.resident import load_decoder
from ghost_dist.errors import CheckpointError, ConfigError
from ghost_dist.pipeline import engine, inputs
from ghost_dist.pipeline.engine import costs_of, shape_of
from ghost_dist.pipeline.inputs import refittable_layers
from ghost_dist.planning import plan as planning
from ghost_dist.planning import probe, stage_plans
from ghost_dist.planning.plan import plan_run
from ghost_dist.planning.probe import measure
from ghost_dist.planning.rates import Rates
from ghost_dist.spans import Span
from ghost_dist.statistics.span_sums import moments_flops

pytestmark = pytest.mark.model  # of 405B, on the meta device: seconds each
CPU = torch.device("cpu")
DEFAULTS = {"operator__name": "auto", "operator__features": "auto", "operator__choose": "kl"}
LLAMA_405B = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.fixture(scope="module")
def llama_405b(tmp_path_factory):
    return write_headers(tmp_path_factory.mktemp("405b"), transformers.LlamaConfig(**LLAMA_405B))


MIXTURE_1T = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "vocab_size": 163840,
}


@pytest.fixture(scope="module")
def mixture_1t(tmp_path_factory):
    config = transformers.DeepseekV3Config(**MIXTURE_1T)
    folder = tmp_path_factory.mktemp("1t")
    return write_headers(folder, config, name="DeepseekV3ForCausalLM")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def of_a_gpu(kinds, dtype="bfloat16"):
    """Round figures of a machine, for predictions that can be checked by hand."""
    return Rates(
        device="GPU X",
        read=2e9,
        read_from="checkpoint",
        load=4e9,
        write=1e9,
        products={dtype: 5e14, **dict.fromkeys((*kinds, "pairs"), 5e13)},
        factors=dict.fromkeys((*kinds, "stream"), 5e13),
        process_s=5.0,
        measured_s=1.0,
    )


@pytest.fixture
def gpu_of(monkeypatch):
    """Let the plan find so much memory and a machine of known rates."""

    def have(device_gb, host_gb=500, disk_gb=10_000, kinds=("stream", "joint", "stream+norm")):
        monkeypatch.setattr(engine, "free_bytes", lambda _: int(device_gb * 1e9))
        monkeypatch.setattr(planning, "open_device", lambda _: torch.device("cuda"))
        monkeypatch.setattr(inputs, "fit_room", lambda _: int(device_gb * 1e9))
        for module in (planning, engine, probe):
            monkeypatch.setattr(module, "device_name", lambda _: "GPU X")
        monkeypatch.setattr(stage_plans, "cached_share", lambda _: 0.0)
        monkeypatch.setattr(stage_plans, "keeps_model", lambda _: False)
        for module in (planning, stage_plans):
            monkeypatch.setattr(module, "host_free_bytes", lambda: int(host_gb * 1e9))
        usage = type("usage", (), {"free": int(disk_gb * 1e9)})
        monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: usage)
        monkeypatch.setattr(planning, "measure", lambda *_: of_a_gpu(kinds))

    return have


def configure(model, tmp_path, **overrides):
    given = {
        "model.path": str(model),
        "model.dtype": "bfloat16",
        "selection.spans": [[100, 120]],
        "operator.name": "ghost",
        "operator.features": "stream",
        "engine.device": "cpu",
        "output.path": str(tmp_path / "run"),
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    return load_config(None, given)


def test_a_405b_checkpoint_takes_no_room_on_the_disk(llama_405b):
    files = list(llama_405b.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) > 800e9
    assert sum(path.stat().st_blocks * 512 for path in files) < 10e6


def test_bytes_flops_and_seconds_of_405b_by_hand(llama_405b, tmp_path, gpu_of):
    gpu_of(80)
    plan = plan_run(configure(llama_405b, tmp_path, operator__choose="residual"))
    assert plan.engine.kind == "streaming"
    assert plan.engine.prefetch
    stages = {stage.name: stage for stage in plan.stages}
    c, f, kv, v = 16384, 53248, 1024, 128256
    layer = 2 * c * c + 2 * c * kv + 3 * c * f + 2 * c  # numbers of one layer
    calibrate = stages["calibrate"]
    assert calibrate.read_bytes == 2 * (120 * layer + v * c)
    tokens, length = 32 * 2048, 2048
    per_token = 120 * (2 * (layer - 2 * c) + 4 * c * length)
    sums = sum(2 * 4096 * 4096 * (block + 1) for block in range(4)) + 2 * c * c
    assert calibrate.flops == tokens * (per_token + sums)
    # Reading at 2 GB/s takes longer than computing at 500 TFLOP/s, and hides it.
    assert calibrate.parts["forward"] == pytest.approx(tokens * per_token / 5e14)
    assert calibrate.parts["read"] + calibrate.parts["forward"] == pytest.approx(
        calibrate.read_bytes / 2e9
    )
    assert calibrate.parts["sums"] == pytest.approx(tokens * sums / 5e13)
    gram = c * c * (1 + 1 / 16) / 2  # 16 strips
    nbytes = 8 * (gram + c * c + 3 * c)
    assert calibrate.written_bytes == 4 * nbytes  # a range per fold
    assert calibrate.parts["store"] == pytest.approx(4 * nbytes / 1e9)
    # 4 folds x 13 ridges for 64 mixtures of the targets, then 5 about the least, and the final fit.
    fits = 52 * (c**3 // 3 + 4 * c**2 * 64) + 21 * (c**3 // 3 + 4 * c**3)
    assert stages["solve"].parts["fit"] == pytest.approx(fits / 5e13)
    assert stages["export"].parts["processes"] == 5.0
    assert plan.disk_bytes["statistics"] == 4 * nbytes
    assert plan.disk_bytes["checkpoint"] == pytest.approx(
        2 * (106 * layer + 2 * v * c + 2 * c * c), rel=1e-3
    )


def test_memory_of_the_streaming_engine(llama_405b, tmp_path, gpu_of):
    gpu_of(80)
    plan = plan_run(configure(llama_405b, tmp_path, operator__choose="residual"))
    layer = 2 * (2 * 16384**2 + 2 * 16384 * 1024 + 3 * 16384 * 53248 + 2 * 16384)
    calibrate = next(stage for stage in plan.stages if stage.name == "calibrate")
    activations = 2 * (4 * 2048) * 3 * 53248 * 2  # two batches of four windows
    assert plan.engine.device_bytes["calibrate"] == 2 * layer + activations
    streams = 32 * 2048 * 16384 * 2
    assert calibrate.streams == "device"
    assert calibrate.device_bytes == plan.engine.device_bytes["calibrate"] + 3 * streams
    gpu_of(device_gb=18, host_gb=60)  # 3 times 2.1 GB beside a layer are too much
    plan = plan_run(configure(llama_405b, tmp_path, operator__choose="residual"))
    calibrate = next(stage for stage in plan.stages if stage.name == "calibrate")
    assert calibrate.streams == "host"
    sums = 8 * (2 * 16384**2 + 3 * 16384)
    assert calibrate.host_bytes == sums + 16 * (32 << 20) + 3 * streams
    assert calibrate.device_bytes == plan.engine.device_bytes["calibrate"]


@pytest.mark.parametrize(
    ("device_gb", "kind", "prefetch"),
    [
        (900, "streaming", True),
        (1100, "resident", True),
        (22, "streaming", True),
        (18, "streaming", False),
    ],
)
def test_auto_takes_the_engine_that_fits(llama_405b, tmp_path, gpu_of, device_gb, kind, prefetch):
    gpu_of(device_gb)
    plan = plan_run(configure(llama_405b, tmp_path, operator__choose="residual"))
    assert (plan.engine.kind, plan.engine.prefetch) == (kind, prefetch)
    # Four folds of a Gram and a cross, and three copies more: 30 GB.
    assert any("the CPU fits" in note for note in plan.notes) == (device_gb < 30)


@pytest.mark.parametrize(
    ("machine", "overrides", "words"),
    [
        ({"device_gb": 5}, {}, ["even one layer at a time", "6.38 GB", "5.00 GB free"]),
        (
            {"device_gb": 80},
            {"engine__kind": "resident"},
            ["engine.kind=resident needs", "80.00 GB free", "engine.kind=streaming needs"],
        ),
        (
            {"device_gb": 80, "disk_gb": 100},
            {},
            ["disk space", "statistics 13", "100.00 GB free", "4 ranges are enough (now 4)"],
        ),
        (
            {"device_gb": 80},
            {"engine__tensor_parallel": 3},
            ["engine.tensor_parallel=3 does not divide"],
        ),
        (
            {"device_gb": 80},
            {"engine__tensor_parallel": 4},
            ["engine.tensor_parallel=4 needs", "on each rank"],
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_its_numbers(
    llama_405b, tmp_path, gpu_of, machine, overrides, words
):
    gpu_of(**machine)
    with pytest.raises(ConfigError) as refused:
        plan_run(configure(llama_405b, tmp_path, **overrides))
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("device_gb", "experts", "held"),
    [
        (140, "auto", None),  # three whole layers
        (80, "auto", 192),
        (40, "auto", 128),
        (24, "auto", 55),
        (80, 100, 100),
        (16, "auto", 16),
    ],
)
def test_a_mixture_of_1t_is_planned_with_its_experts_in_parts(
    mixture_1t, tmp_path, gpu_of, device_gb, experts, held
):
    gpu_of(device_gb)
    spans = [[30, 40]]
    config = configure(mixture_1t, tmp_path, selection__spans=spans, engine__experts=experts)
    plan = plan_run(config)
    assert (plan.engine.kind, plan.engine.experts) == ("streaming", held)
    assert plan.tree()["engine"]["experts"] == held
    if held is None:
        return
    expert = 2 * 3 * 7168 * 2048
    layer = max(layer.loaded_bytes for layer in _sizes(mixture_1t).layers)
    rest = layer - 384 * expert
    dense = _sizes(mixture_1t).layers[0].loaded_bytes
    batch = 4 * 2048 * 8 * 2 * (7 * 7168 + 3 * 2048)  # bytes of all pairs of token and expert
    calibrate = next(stage for stage in plan.stages if stage.name == "calibrate")
    weights = plan.engine.device_bytes["calibrate"] - batch
    assert weights == rest + dense + 2 * held * expert
    streams = 32 * 2048 * 7168 * 2
    asked = 9 * streams  # the input of the experts and eight answers
    room = 0.85 * device_gb * 1e9 - plan.engine.device_bytes["calibrate"]
    waiting = asked * (room >= 3 * streams + asked) + 3 * streams * (room >= 3 * streams)
    assert calibrate.device_bytes == plan.engine.device_bytes["calibrate"] + waiting
    on_host = calibrate.host_bytes - 16 * (32 << 20) - 8 * (2 * 7168**2 + 3 * 7168)
    assert on_host == 3 * streams + asked - waiting
    assert f"with {held} of 384 routed experts at a time" in plan.engine.reason
    sizes = _sizes(mixture_1t)
    passed = sum(
        layer.flops(2048) + (layer.experts > 0) * sizes.rest_flops(layer, 2048)
        for layer in sizes.layers[:40]
    )
    sums = moments_flops(7168, 7168)
    assert calibrate.flops == pytest.approx(32 * 2048 * (passed + sums), rel=1e-4)
    # Each expert is read once, as whole layers would be.
    whole = sum(layer.stored_bytes for layer in _sizes(mixture_1t).layers[:40])
    assert calibrate.read_bytes == whole + 2 * 163840 * 7168


@functools.cache
def _sizes(folder):
    source = open_checkpoint(folder)
    return model_sizes(source, inspect_architecture(source), torch.bfloat16)


def test_a_mixture_of_which_not_even_one_expert_fits_is_refused(mixture_1t, tmp_path, gpu_of):
    gpu_of(8)
    config = configure(mixture_1t, tmp_path, selection__spans=[[30, 40]])
    with pytest.raises(ConfigError, match=r"even 1 of 384 routed experts .* need \d+\.\d+ GB"):
        plan_run(config)
    gpu_of(16, host_gb=10)
    with pytest.raises(ConfigError, match="for what a layer's experts are asked and answer"):
        plan_run(config)


def test_a_cluster_shares_the_forward(llama_405b, tmp_path, gpu_of):
    gpu_of(180)
    one = plan_run(configure(llama_405b, tmp_path, engine__tensor_parallel=8))
    two = plan_run(configure(llama_405b, tmp_path, engine__tensor_parallel=8, engine__replicas=2))
    assert one.engine.kind == "tensor_parallel"
    first, second = (
        next(s for s in plan.stages if s.name == "calibrate").parts for plan in (one, two)
    )
    assert second["forward"] == pytest.approx(first["forward"] / 2)
    assert second["read"] == first["read"]  # every replica reads for itself
    assert any("cluster" in note for note in one.notes)


def test_streaming_replicas_read_once_a_range(llama_405b, tmp_path, gpu_of):
    gpu_of(180)
    fields = {"engine__kind": "streaming", "calibration__ranges": 7}
    alone, shared = (
        plan_run(configure(llama_405b, tmp_path, **fields, **of_cluster))
        for of_cluster in ({}, {"engine__replicas": 2})
    )
    one, two = (next(s for s in plan.stages if s.name == "calibrate") for plan in (alone, shared))
    assert shared.engine.kind == "streaming"
    assert two.read_bytes == 4 * one.read_bytes  # of seven ranges one replica has four
    assert two.parts["forward"] == pytest.approx(one.parts["forward"] * 4 / 7, rel=1e-3)
    # Reading is the bound here, and what is computed meanwhile is not counted twice.
    seconds = [sum(stage.parts[p] for p in ("read", "forward")) for stage in (one, two)]
    assert seconds[1] == pytest.approx(4 * seconds[0], rel=1e-3)
    assert two.flops == one.flops
    assert "streams" in alone.disk_bytes
    assert "streams" not in shared.disk_bytes  # nothing is saved between two layers


def test_ranks_that_share_a_reading_share_the_forward_too(llama_405b, tmp_path, gpu_of):
    gpu_of(180)
    fields = {"engine__kind": "streaming", "engine__replicas": 2}
    plans = [
        plan_run(configure(llama_405b, tmp_path, **fields, engine__data_parallel=n)) for n in (1, 4)
    ]
    one, four = (next(s for s in plan.stages if s.name == "calibrate") for plan in plans)
    assert plans[1].engine.kind == "streaming"
    assert four.read_bytes == one.read_bytes
    for part in ("forward", "sums"):
        assert four.parts[part] == pytest.approx(one.parts[part] / 4, rel=1e-3)
    assert any("4 ranks, which share the windows and one reading" in n for n in plans[1].notes)


def test_too_few_tokens_are_said_before_the_work(make_config, gpu_of):
    gpu_of(80)
    joint = {"operator__name": "ghost-joint", "model__dtype": "bfloat16"}  # C + F = 48 + 96
    (note,) = [
        n for n in plan_run(make_config(**joint, calibration__windows=8)).notes if "regressors" in n
    ]
    assert "3.6 for each of the 144 regressors of ghost-joint" in note
    assert note.endswith("--set calibration.windows=32")
    enough = plan_run(make_config(**joint, calibration__windows=9))
    assert not any("regressors" in note for note in enough.notes)


def test_spans_that_are_not_known_are_those_that_cost_most(make_config, gpu_of):
    gpu_of(80)
    plan = plan_run(
        make_config(selection__spans=None, selection__remove=3, model__dtype="bfloat16")
    )
    assert (plan.spans, plan.spans_known) == ((Span(5, 8),), False)
    assert [stage.name for stage in plan.stages][:2] == ["tokens", "select"]
    assert any("not known" in note for note in plan.notes)
    several = plan_run(
        make_config(
            selection__spans=None,
            selection__criterion="search",
            selection__remove=3,
            selection__max_spans=2,
            model__dtype="bfloat16",
        )
    )
    assert several.spans == (Span(4, 5), Span(6, 8))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral", "granite", "olmo2"])
def test_down_projections_are_judged_as_the_run_judges_them(checkpoint, tmp_path, family):
    from families import _COMMON

    if family == "granite":  # scales what its MLP gives
        config = transformers.GraniteConfig(
            **_COMMON, num_key_value_heads=2, intermediate_size=96, residual_multiplier=0.5
        )
        torch.manual_seed(0)
        transformers.GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
        source = open_checkpoint(tmp_path / "granite")
        architecture = inspect_architecture(source)
    else:
        source, architecture = checkpoint(family)
    config = configure(source.path, tmp_path, operator__name="auto", selection__spans=[[2, 4]])
    found = refittable_layers(config, source, architecture)
    assert bool(found) == (family == "llama")
    first = min(architecture.down_projections, default=None)
    if first is not None:  # as on the real layers
        decoder = load_decoder(
            source.path, architecture, num_layers=first + 1, dtype=torch.float32, device=CPU
        )
        assert adds_mlp_output(decoder, first) == bool(found)


def test_the_probe_measures_this_machine_and_leaves_nothing(make_config, tmp_path):
    config = make_config(**DEFAULTS)
    run = shape_of(planning._open(config)[0])
    rates = measure(run, costs_of(run), tmp_path)
    kinds = {"joint"}  # the sums of stream follow from those of joint
    assert all(v > 0 for v in vars(rates).values() if isinstance(v, float)), rates
    layers = {layer.kind for layer in run.sizes.layers}
    assert rates.products.keys() == {*layers, "head", "float32", "float64", *kinds}
    assert rates.factors.keys() == {"joint"}
    assert min(*rates.products.values(), *rates.factors.values()) > 0
    assert rates.read_from == "checkpoint"
    assert not list(tmp_path.glob(".ghost-dist-probe-*"))


def test_sums_that_stay_in_memory_take_no_time_to_write_and_read(make_config, gpu_of):
    config = make_config(operator__features="stream")
    rates, choice = of_a_gpu(("stream",), "float32"), EngineChoice("resident", "", {})
    rates = dataclasses.replace(rates, write=1e6, load=2e6)
    for gigabytes, stored in ((80, False), (1e-6, True)):
        gpu_of(gigabytes, host_gb=gigabytes)
        run = shape_of(planning._open(config)[0])
        costs = costs_of(run)
        taken, fitted = (
            stage_plans.stage_seconds(run, costs[name], choice, rates, 0.0)
            for name in ("calibrate", "solve")
        )
        nbytes = costs["calibrate"].commit_bytes
        assert nbytes == costs["solve"].sums_read_bytes == 4 * 8 * (2 * 48 * 48 + 3 * 48)
        assert taken.get("store", 0) == pytest.approx(stored * nbytes / 1e6)
        assert fitted.get("store", 0) == pytest.approx(stored * nbytes / 2e6)


def test_only_an_offloaded_run_reads_while_it_computes_and_past_the_cache(make_config, gpu_of):
    gpu_of(80)
    config = make_config(operator__features="stream")
    run, rates = shape_of(planning._open(config)[0]), of_a_gpu(("stream",), "float32")
    costs = costs_of(run)
    for kind, cached in (("resident", 0.0), ("resident", 1.0), ("streaming", 0.0)):
        choice = EngineChoice(kind, "", {})
        parts = stage_plans.stage_seconds(run, costs["calibrate"], choice, rates, cached)
        nbytes = costs["calibrate"].read_bytes(run.sizes)
        assert nbytes == run.sizes.decoder_stored_bytes(5) > 0
        computed = parts["forward"] if kind == "streaming" else 0.0
        assert parts.get("read", 0.0) == pytest.approx((1 - cached) * nbytes / 2e9 - computed)
        assert ("load" in parts) == (kind == "resident")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return stopped.value.code or 0, printed.out, printed.err


def test_the_command_measures_once_and_prints_json(
    model_folder, text_file, tmp_path, capsys, monkeypatch
):
    arguments = [
        *("plan", model_folder, "--spans", "3:5", "--out", tmp_path / "run", "--json"),
        *("--set", f"calibration.source={text_file}", "--set", "engine.device=cpu"),
        *("--set", "calibration.window_length=64"),
    ]
    monkeypatch.setattr(planning, "host_load", lambda: 1.2)
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert json.loads(out)["off_by"] > 3
    assert "other programs use 100% of this machine's cores" in json.loads(out)["notes"][-1]
    monkeypatch.setattr(planning, "host_load", lambda: 0.0)
    code, out, err = run(capsys, *arguments)  # what was measured beside others was not kept
    assert code == 0
    tree = json.loads(out)
    assert tree["off_by"] < 2
    assert not any("programs" in note for note in tree["notes"])
    assert [stage["name"] for stage in tree["stages"]] == ["tokens", "calibrate", "solve", "export"]
    assert tree["engine"]["kind"] == "resident"
    assert tree["seconds"] == pytest.approx(sum(stage["seconds"] for stage in tree["stages"]))
    assert "measuring" in err
    assert not (tmp_path / "run").exists()
    calls = []
    monkeypatch.setattr(planning, "measure", lambda *_: calls.append(1) or of_a_gpu(()))
    code, out, err = run(capsys, *arguments)
    assert (code, calls) == (0, [])
    assert json.loads(out)["rates"] == tree["rates"]
    assert "measuring" not in err


def test_a_table_for_people(llama_405b, tmp_path, capsys, gpu_of, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    gpu_of(80)
    code, out, _ = run(
        capsys,
        *("plan", llama_405b, "--spans", "100:120", "--out", tmp_path / "run"),
        *("--operator", "ghost", "--set", "model.dtype=bfloat16", "--set", "engine.device=cpu"),
    )
    assert code == 0
    assert "126 layers, removing [100, 120)" in out
    assert "engine streaming: the whole model would need" in out
    assert "calibrate" in out
    assert "there is no tokenizer" in out


def test_a_refusal_is_a_wrong_configuration(llama_405b, tmp_path, capsys, gpu_of):
    gpu_of(5)
    code, out, err = run(
        capsys,
        *("plan", llama_405b, "--spans", "100:120", "--out", tmp_path / "run"),
        *("--set", "model.dtype=bfloat16", "--set", "engine.device=cpu"),
    )
    assert (code, out) == (2, "")
    assert "even one layer at a time" in err


def test_a_truncated_shard_is_found_as_by_a_run(llama_405b, tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4
    )
    folder = write_headers(tmp_path / "small", config)
    shard = folder / "model-2.safetensors"
    with shard.open("r+b") as opened:
        opened.truncate(shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="model-2.safetensors is truncated"):
        plan_run(configure(folder, tmp_path, selection__spans=[[1, 2]]))
    assert Path(llama_405b).exists()
