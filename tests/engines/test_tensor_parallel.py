"""The tensor-parallel engine against the resident one: two real processes, gloo, every family.

One pair of processes does all runs (``tensor_parallel_rank.py``); the tests look at what both
ranks reported.
"""

import json
import os
import subprocess
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from block_scaled import save_in_fp8
from families import FAMILIES, HIDDEN, save_checkpoint
from safetensors.torch import load_file, save_file

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.engines import tensor_parallel
from ghost_dist.engines.sharding import check_degree
from ghost_dist.engines.tensor_parallel import open_tensor_parallel
from ghost_dist.errors import ConfigError

pytest.importorskip("deepspeed")

DEGREE = 2
SHARDED = {family for family in FAMILIES if family != "gpt2"}
SHARE = {"opt": 0.56, "deepseek_v3": 0.66, "bamba": 0.77, "falcon_h1": 0.75}
"""Largest share of the parameters per rank: learned positions, low-rank projections and
state-space mixers are replicated."""

IN_FP8 = ("llama", "mixtral")

SABOTAGED = {
    "experts are not summed": "mixtral",
    "linear layers are not summed": "llama",
    "biases of experts are added by every rank": "gpt_oss",
    "wide norms are left whole": "olmo2",
    "wide norms see their own columns only": "olmo2",
    "sinks are left whole": "gpt_oss",
    "fused attention keeps the heads of all": "phi3",
    "mixers are sharded": "falcon_h1",
    "buffers are wiped": "gemma3",
}


def save_uneven(folder):
    """An MLP of 97 columns: the ranks hold 49 and 48."""
    config = FAMILIES["llama"]()
    config.intermediate_size = 97
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def save_gated(folder):
    """Linear attention and full attention by turns; shared experts behind a gate of one output."""
    config = transformers.Qwen3NextConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        intermediate_size=96,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def damage(folder, change):
    save_checkpoint("llama", folder, max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_second_rank(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][-1, 0] = float("nan")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, forked):
    """What both ranks reported, by run."""
    folder = tmp_path_factory.mktemp("world")
    for family in FAMILIES:
        save_checkpoint(family, folder / family)
    save_uneven(folder / "uneven")
    save_gated(folder / "gated")
    for family in IN_FP8:
        fp8, twin = folder / f"{family} fp8", folder / f"{family} twin"
        save_in_fp8(folder / family, fp8, twin, (40, 28))
    damage(folder / "spoilt", spoil_second_rank)
    runs = [(family, family, "float32", None) for family in (*FAMILIES, "uneven", "spoilt")]
    runs += [
        (f"{family} bfloat16", family, "bfloat16", None)
        for family in ("llama", "gemma3", "mixtral")
    ]
    runs += [
        (f"{family} {form}", f"{family} {form}", "float32", None)
        for family in IN_FP8
        for form in ("fp8", "twin")
    ]
    runs.append(("gated", "gated", "float32", None))
    runs.append(("ungated", "gated", "float32", "gates of one output are sharded"))
    runs += [(why, family, "float32", why) for why, family in SABOTAGED.items()]
    (folder / "plan.json").write_text(json.dumps({"runs": runs}))
    script = Path(__file__).with_name("tensor_parallel_rank.py")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join((root, environment.get("PYTHONPATH", "")))
    processes = []
    for rank in range(DEGREE):
        with (folder / f"rank{rank}.log").open("w") as log:
            arguments = [forked.program, str(script), str(folder), str(rank), str(DEGREE)]
            processes.append(
                subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(DEGREE))
    assert codes == [0] * DEGREE, logs
    assert "AutoTP: " not in logs, "DeepSpeed's chatter is in the way of progress lines"
    reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(DEGREE)]
    return {run: [report[run] for report in reports] for run in reports[0]}


@pytest.mark.parametrize("family", IN_FP8)
def test_slices_of_fp8_are_those_of_its_bfloat16_twin(ranks, family):
    """Slices that begin within a block, and experts that are merged."""
    for stored, twin in zip(ranks[f"{family} fp8"], ranks[f"{family} twin"], strict=True):
        assert stored["streams"] == twin["streams"]
        assert stored["parameter_bytes"] == twin["parameter_bytes"]
        assert stored["differences"]["boundary"] < 2e-5


def check_alike(results, share, tolerance=2e-5):
    first, second = results
    assert "kind" not in first, first
    assert first["streams"] == second["streams"], "the ranks pushed different streams"
    for result in results:
        # float32: sums in another order. Streams, gathered inputs H and products H @ down.
        assert max(result["differences"].values()) < tolerance, result["differences"]
        assert result["conformance"] < tolerance
        assert result["parameter_bytes"] <= share * result["whole_bytes"]
        sharded, whole = result["adds_mlp_output"]
        assert sharded == whole


@pytest.mark.parametrize("family", sorted(SHARDED))
def test_deepspeed_computes_what_one_device_computes(ranks, family):
    results = ranks[family]
    check_alike(results, SHARE.get(family, 0.535))
    buffers = {"deepseek_v3": 3 * 4 * 4}.get(family, 0)  # layers x experts x float32
    for result in results:  # nothing was read that is not kept
        assert result["read_bytes"] == result["parameter_bytes"] + buffers


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - SHARDED))
def test_what_deepspeed_shards_wrongly_is_refused(ranks, family):
    for result in ranks[family]:
        assert result["kind"] == "UnsupportedArchitectureError"
        assert f"Family {family} cannot be sharded by DeepSpeed" in result["message"]
        assert "engine.tensor_parallel=1" in result["message"]


def test_an_uneven_mlp_is_gathered_whole(ranks):
    results = ranks["uneven"]
    check_alike(results, share=0.54)
    assert [result["widest"] for result in results] == [97, 97]


def test_gates_with_fewer_outputs_than_ranks_stay_whole(ranks):
    check_alike(ranks["gated"], share=0.75)
    for result in ranks["ungated"]:  # else one rank would stop where the other waits
        assert result["kind"] == "UnsupportedArchitectureError"
        assert "shared_expert_gate, of size 1, leaves some of 2 ranks" in result["message"]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_bfloat16_is_as_near_to_float32_as_unsharded_bfloat16(ranks, family):
    first, second = ranks[f"{family} bfloat16"]
    assert first["streams"] == second["streams"]
    assert 0 < first["error"] < 1.25 * first["error_unsharded"]
    assert first["parameter_bytes"] <= 0.54 / 2 * first["whole_bytes"]


@pytest.mark.parametrize("why", SABOTAGED)
def test_a_fault_is_found_before_real_weights_are_loaded(ranks, why):
    for result in ranks[why]:
        assert result.get("kind") == "UnsupportedArchitectureError", result
        assert "a small random model of it does not compute" in result["message"]
        assert "engine.tensor_parallel=1" in result["message"]


def test_a_damaged_checkpoint_stops_all_ranks(ranks):
    first, second = ranks["spoilt"]
    for result in (first, second):
        assert result["kind"] == "CheckpointError"
        assert "layers.1.mlp.up_proj.weight holds NaN" in result["message"]
    assert "Found by rank 1" in first["message"]


def test_a_world_of_one_is_the_degenerate_case(ranks):
    for result in ranks["alone"]:
        check_alike([result, result], share=1.0)
        assert result["parameter_bytes"] == result["whole_bytes"]


def test_degrees_that_do_not_divide_the_heads():
    config = transformers.LlamaConfig(hidden_size=96, num_attention_heads=12, num_key_value_heads=4)
    for degree in (1, 2, 4):
        check_degree(config, degree)
    with pytest.raises(ConfigError, match=r"12 heads and 4 key-value heads, found 3.*1, 2, 4"):
        check_degree(config, 3)
    with pytest.raises(ConfigError, match="does not divide the 12 attention heads"):
        check_degree(config, 8)


def test_without_deepspeed_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(tensor_parallel.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"not installed. In the checkout: pip install"):
        tensor_parallel._prepare_deepspeed(torch.device("cpu"))


def test_without_a_world_nothing_is_started(tmp_path):
    save_checkpoint("llama", tmp_path)
    architecture = inspect_architecture(open_checkpoint(tmp_path))
    with pytest.raises(ConfigError, match="a torch.distributed world of 2 .* none that is init"):
        open_tensor_parallel(
            tmp_path,
            architecture,
            num_layers=2,
            dtype=torch.float32,
            device=torch.device("cpu"),
            degree=2,
            batch=1,
        )
