"""Checkpoints from the wild that do not hold the model of their config.json: found before any work,
by every engine, by ``plan`` and by ``compare``, and named."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ghost_dist
from ghost_dist.errors import CheckpointError
from ghost_dist.pipeline.compare import compare
from ghost_dist.pipeline.inputs import open_model


def edit(folder, change):
    """Let ``change`` edit the tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def without_head(folder):
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))


def without_an_expert(folder):
    config = transformers.MixtralConfig(
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=json.loads((folder / "config.json").read_text())["vocab_size"],
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    edit(folder, lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"))


def with_a_classifier(folder):
    edit(folder, lambda tensors: tensors.update({"score.weight": torch.ones(2, 48)}))


def with_biases(folder):
    bias = {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(48) for i in range(8)}
    edit(folder, lambda tensors: tensors.update(bias))


def with_more_layers_than_it_says(folder):
    configure(folder, num_hidden_layers=6)


def with_another_width(folder):
    configure(folder, intermediate_size=64)


def in_whole_numbers(folder):
    name = "model.layers.2.mlp.up_proj.weight"
    edit(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))


def with_a_dtype_of_tomorrow(folder):
    name = "model.layers.2.mlp.up_proj.weight"
    edit(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.uint16)}))


def in_fp8_without_scales(folder):
    name = "model.layers.2.mlp.up_proj.weight"
    edit(folder, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))


def with_an_adapter(folder):
    """As PEFT saves it."""
    content = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{path}.lora_A.weight": torch.ones(2, 48),
        f"{path}.lora_B.weight": torch.ones(48, 2),
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


UNFIT = {
    without_head: r"LlamaForCausalLM.*1 parameters have no tensor \(lm_head\.weight \[\d+, 48\]\)",
    without_an_expert: r"model\.safetensors: tensor model\.layers\.1\.block_sparse_moe\.experts\."
    r"0\.w1\.weight \(and 4 more\) cannot become .*\.experts\.gate_up_proj: .*Concatenate on",
    with_a_classifier: r"1 tensors have no parameter "
    r"\(score\.weight F32 \[2, 48\] in model\.safetensors\)",
    with_biases: r"8 tensors have no parameter "
    r"\(model\.layers\.0\.self_attn\.q_proj\.bias F32 \[48\] in .*attention_bias",
    with_more_layers_than_it_says: r"18 tensors have no parameter \(model\.layers\.6\.",
    with_another_width: r"model\.safetensors: tensor model\.layers\.0\.mlp\.down_proj\.weight "
    r"gives .* the shape \[48, 96\], expected \[48, 64\]",
    in_whole_numbers: r"model\.safetensors: tensor model\.layers\.2\.mlp\.up_proj\.weight is I8",
    with_a_dtype_of_tomorrow: r"tensor model\.layers\.2\.mlp\.up_proj\.weight is U16, expected",
    in_fp8_without_scales: r"up_proj\.weight is FP8, but its scales .* are not there",
    with_an_adapter: r"PEFT adapter \(adapter_config\.json\).*Merge the adapter first",
}
"""What was done to a checkpoint, and what must be said."""

WAYS = {
    "resident": lambda config: ghost_dist.recover(config, progress=False),
    "streaming": lambda config: ghost_dist.recover(config, progress=False),
    "tensor_parallel": lambda config: ghost_dist.recover(config, progress=False),
    "plan": ghost_dist.plan,
    "compare": lambda config: compare(config, [2], ["none"], ["paper"]),
}


@pytest.fixture(scope="module")
def unfit(model_folder, tmp_path_factory):
    """Function from what is done to a checkpoint to its folder; each is made once."""
    made = {}

    def get(change):
        if change not in made:
            folder = tmp_path_factory.mktemp("unfit") / change.__name__
            shutil.copytree(model_folder, folder)
            change(folder)
            made[change] = folder
        return made[change]

    return get


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", UNFIT, ids=lambda change: change.__name__)
def test_found_before_any_work(unfit, make_config, tmp_path, change, way):
    config = make_config(
        model__path=str(unfit(change)),
        engine__kind=way if way in ("resident", "streaming") else "auto",
        engine__tensor_parallel=2 if way == "tensor_parallel" else 1,
    )
    with pytest.raises(CheckpointError, match=UNFIT[change]) as error:
        WAYS[way](config)
    assert str(unfit(change)) in str(error.value)
    run = tmp_path / "run"
    assert not [path.name for path in run.glob("*") if "statistics" in path.name]


def test_a_head_that_is_tied_by_the_configuration_is_none_that_is_missing(
    unfit, make_config, tmp_path
):
    folder = shutil.copytree(unfit(without_head), tmp_path / "tied")
    configure(folder, tie_word_embeddings=True)
    open_model(make_config(model__path=str(folder)))


def with_code_of_its_own(model_folder, tmp_path, auto_map):
    folder = shutil.copytree(model_folder, tmp_path / "own")
    configure(folder, auto_map=auto_map)
    (folder / "modeling_own.py").write_text("raise SystemExit('this ran')")
    return str(folder)


OWN = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_the_checkpoint_is_not_passed_over_in_silence(
    model_folder, make_config, tmp_path, capfd, trust
):
    path = with_code_of_its_own(model_folder, tmp_path, OWN)
    config = make_config(model__path=path, model__trust_remote_code=trust)
    ghost_dist.pipeline.recover.recover(config, again="select")
    said = capfd.readouterr().err
    assert "model code of its own (modeling_own.OwnForCausalLM), which is never run" in said
    assert "transformers itself has for llama is used" in said


def test_plan_says_it_too(model_folder, make_config, tmp_path):
    path = with_code_of_its_own(model_folder, tmp_path, OWN)
    [note] = [n for n in ghost_dist.plan(make_config(model__path=path)).notes if "code" in n]
    assert "modeling_own.OwnForCausalLM" in note


def test_code_for_the_tokenizer_alone_is_not_the_models(model_folder, make_config, tmp_path):
    path = with_code_of_its_own(
        model_folder, tmp_path, {"AutoTokenizer": ["modeling_own.Own", None]}
    )
    assert open_model(make_config(model__path=path))[0].notes == ()
