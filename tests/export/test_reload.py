"""Exported folders, loaded by plain transformers in a fresh process, against two references.

The process cannot import ghost_dist. One reference is the recovered model in memory, as the
pipeline has it; the other is made from the uncut model by none of the code under test.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from families import (
    CUTS,
    FAMILIES,
    HALVED,
    HALVES,
    VOCAB,
    oracle_logits,
    random_operators,
    random_repairs,
    random_tokens,
    rounding,
    save_checkpoint,
)

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.surgery import insert_operators, remove_layers
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.find_halves import with_halves
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.errors import ExportError, UnsupportedArchitectureError
from ghost_dist.evaluation.scores import last_logits
from ghost_dist.export.reload_script import generate
from ghost_dist.export.rewrite import export_checkpoint
from ghost_dist.export.verify import reload, verify_reload
from ghost_dist.spans import parse_sublayers

CPU = torch.device("cpu")
TOKENS = random_tokens()
MATRIX_KINDS = ("ghost-joint", "fold")
MATRIX_CUTS = ("middle", "two", "second")  # one span, two spans, a span at layer 1
GRID = [(family, cut) for family in FAMILIES for cut in CUTS]
NOT_REFITTED = {
    # The layer below the only span, or below both, has experts, or no nn.Linear (GPT-2).
    *((family, cut) for family in ("mixtral", "gpt_oss", "gpt2") for cut in MATRIX_CUTS),
    ("qwen3_moe", "middle"),
}
WHOLE = ("falcon_h1", "bamba")  # one layer mixes twice; a cache that needs its attentions
HALF_GRID = [(family, cut) for family in FAMILIES if family not in WHOLE for cut in HALVES]
NORM_CUTS = ("first", "middle", "last")
REPAIRS = [
    *(
        (family, kind, cut)
        for family in FAMILIES
        for kind in MATRIX_KINDS
        for cut in MATRIX_CUTS
        if (family, cut) not in NOT_REFITTED
    ),
    *((family, "stream+norm", "two") for family in FAMILIES),
    *((family, "norm-linear", cut) for family in FAMILIES for cut in NORM_CUTS),
]


def with_night(cell):
    """By day every form with every family, and both with every cut; at night all of them."""
    family, *kind, cut = cell
    turn = list(FAMILIES).index(family)
    if kind == ["norm-linear"]:
        by_day = cut == NORM_CUTS[turn % 3]
    elif kind and kind[0] in MATRIX_KINDS:
        by_day = cut == MATRIX_CUTS[(turn + MATRIX_KINDS.index(kind[0])) % 3]
    else:
        by_day = bool(kind) or family in HALVED
    return pytest.param(*cell, marks=[] if by_day else pytest.mark.chaos_nightly)


@pytest.fixture(scope="session")
def reloaded(request, checkpoint, use_exported, tmp_path_factory):
    """Logits of every cell, and whether generate agrees with itself, from one fresh process."""
    root = tmp_path_factory.mktemp("exported")
    names = []
    for family, cut in GRID:
        source, architecture = checkpoint(family)
        names.append(f"{family}-ghost-{cut}")
        operators, shard = random_operators(CUTS[cut]), 60_000
        export_checkpoint(
            source,
            architecture,
            Variant(CUTS[cut], operators),
            root / names[-1],
            max_shard_bytes=shard,
        )
    tested = [getattr(item, "callspec", None) for item in request.session.items]
    tested = [spec.params for spec in tested if spec is not None]
    for family, kind, cut in REPAIRS:
        if {"family": family, "kind": kind, "cut": cut} not in tested:
            continue
        source, architecture = checkpoint(family)
        names.append(f"{family}-{kind}-{cut}")
        repairs = random_repairs(kind, CUTS[cut], architecture)
        export_checkpoint(source, architecture, Variant(CUTS[cut], repairs), root / names[-1])
    for family, cut in HALF_GRID:
        if {"family": family, "cut": cut} not in tested:
            continue
        source, architecture = checkpoint(family)
        names.append(f"{family}-halves-{cut}")
        architecture = with_halves(source, architecture)
        export_checkpoint(source, architecture, halved(cut), root / names[-1])
    results = use_exported(root, {name: ["reloaded"] for name in names})
    return {
        name: (torch.from_numpy(np.load(root / name / "logits.npy")), results[name]["reloaded"])
        for name in names
    }


def halved(cut):
    spans, sublayers = HALVES[cut]
    return Variant(spans, random_operators(spans), sublayers=sublayers)


@pytest.fixture(scope="module")
def uncut(checkpoint):
    """Function from family to the uncut model; each is loaded once, and hooks are taken off it."""
    models = {}

    def get(family):
        if family not in models:
            source, _ = checkpoint(family)
            models[family] = load_causal_lm(source.path, dtype=torch.float32, device=CPU)
        return models[family]

    return get


def recovered(source, architecture, spans, operators, dtype=torch.float32):
    model = load_causal_lm(source.path, dtype=dtype, device=CPU)
    remove_layers(model, architecture, spans)
    insert_operators(model, architecture, Variant(spans, operators))
    return model


@torch.inference_mode()
def verify(folder, model, dtype=torch.float32):
    """Compare a folder with a model in memory."""
    expected = torch.cat([model(row[None], use_cache=False).logits.float() for row in TOKENS])
    return verify_reload(
        folder,
        expected,
        TOKENS.numpy(),
        num_layers=model.config.num_hidden_layers,
        generate=lambda ids: generate(model, ids)[1][0],
        dtype=dtype,
        device=CPU,
    )


@pytest.mark.parametrize(("family", "cut"), GRID)
def test_reloaded(checkpoint, uncut, reloaded, family, cut):
    source, architecture = checkpoint(family)
    spans, operators = CUTS[cut], random_operators(CUTS[cut])
    found, generates_the_same = reloaded[f"{family}-ghost-{cut}"]
    expected = oracle_logits(uncut(family), architecture.layers, spans, operators, TOKENS)
    assert (found - expected).abs().max() <= rounding(expected)
    model = recovered(source, architecture, spans, operators)
    with torch.inference_mode():
        in_memory = torch.cat([model(row[None], use_cache=False).logits for row in TOKENS])
    assert (found - in_memory).abs().max() <= rounding(in_memory, factor=4)
    assert generates_the_same is True


@pytest.mark.parametrize(("family", "kind", "cut"), [*map(with_night, REPAIRS)])
def test_reloaded_with_every_form_of_repair(checkpoint, uncut, reloaded, family, kind, cut):
    _, architecture = checkpoint(family)
    name = f"{family}-{kind}-{cut}"
    found, generates_the_same = reloaded[name]
    repairs = random_repairs(kind, CUTS[cut], architecture)
    expected = oracle_logits(uncut(family), architecture.layers, CUTS[cut], repairs, TOKENS)
    assert (found - expected).abs().max() <= rounding(expected)
    assert generates_the_same is True


@pytest.mark.parametrize(("family", "cut"), [*map(with_night, HALF_GRID)])
def test_layers_without_attention_or_mlp(checkpoint, uncut, reloaded, family, cut):
    """Exported, in memory and in a sweep against the uncut model whose halves give zeros."""
    source, architecture = checkpoint(family)
    architecture, variant = with_halves(source, architecture), halved(cut)
    found, generates_the_same = reloaded[f"{family}-halves-{cut}"]
    expected = oracle_logits(
        uncut(family),
        architecture.layers,
        variant.spans,
        variant.operators,
        TOKENS,
        sublayers=variant.sublayers,
    )
    assert (found - expected).abs().max() <= rounding(expected)
    assert generates_the_same is True
    tokens = TOKENS.numpy().astype(np.int32)
    layers = LayerwiseModel(uncut(family), architecture)
    swept = last_logits(layers, variant, tokens, lambda _: None)
    assert (swept - expected).abs().max() <= rounding(expected)
    model = load_causal_lm(source.path, dtype=torch.float32, device=CPU)
    remove_layers(model, architecture, variant.spans)
    insert_operators(model, architecture, variant)
    with torch.inference_mode():
        in_memory = torch.cat([model(row[None], use_cache=False).logits for row in TOKENS])
    assert (found - in_memory).abs().max() <= rounding(in_memory, factor=4)
    generate(model, TOKENS)


def test_removed_halves_are_not_in_the_files(checkpoint, tmp_path):
    source, architecture = checkpoint("gemma3")
    architecture, variant = with_halves(source, architecture), halved("mixed")
    export_checkpoint(source, architecture, variant, tmp_path / "out")
    names = [n for n in open_checkpoint(tmp_path / "out").tensors if ".layers.1." in n]
    assert sorted({name.split(".")[3] for name in names}) == [
        *("input_layernorm", "post_attention_layernorm", "self_attn")
    ]
    model = load_causal_lm(source.path, dtype=torch.float32, device=CPU)
    remove_layers(model, architecture, variant.spans)
    insert_operators(model, architecture, variant)
    cache = model(TOKENS, use_cache=True).past_key_values
    empty = [getattr(layer, "keys", None) is None for layer in cache.layers]
    assert empty == [True, False, False, True]


@pytest.mark.parametrize("family", WHOLE)
def test_families_without_halves_are_refused(checkpoint, tmp_path, family):
    """Attention beside a state space; a configuration that cannot say what has no cache."""
    source, architecture = checkpoint(family)
    message = "modules of a layer mix its tokens" if family == "falcon_h1" else "keeps no cache"
    variant = halved("attention")
    with pytest.raises(UnsupportedArchitectureError, match=message):
        export_checkpoint(source, with_halves(source, architecture), variant, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_some_attention_stays(checkpoint, tmp_path):
    source, architecture = checkpoint("llama")
    sublayers = parse_sublayers(",".join(f"attention:{layer}" for layer in range(6)))
    architecture = with_halves(source, architecture)
    with pytest.raises(UnsupportedArchitectureError, match="Keep an attention"):
        export_checkpoint(source, architecture, Variant(sublayers=sublayers), tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_has_no_down_proj_is_left_out(checkpoint, family):
    _, architecture = checkpoint(family)
    for cut in MATRIX_CUTS:
        below = {span.start - 1 for span in CUTS[cut]}
        assert below.isdisjoint(architecture.inner_sizes) == ((family, cut) in NOT_REFITTED)


def test_fold_is_a_plain_checkpoint_of_its_family(checkpoint, tmp_path):
    source, architecture = checkpoint("llama")
    spans = CUTS["two"]
    repairs = random_repairs("fold", spans, architecture)
    export_checkpoint(source, architecture, Variant(spans, repairs), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert not list((tmp_path / "out").glob("*.py"))
    assert open_checkpoint(tmp_path / "out").tensors.keys() < source.tensors.keys()


@pytest.mark.parametrize(
    ("family", "operator_dtype"),
    [
        ("llama", torch.bfloat16),
        ("llama", torch.float32),
        ("qwen3_moe", torch.float32),
        ("gpt_oss", torch.bfloat16),
    ],
)
def test_bfloat16_checkpoints(tmp_path, family, operator_dtype):
    source = open_checkpoint(save_checkpoint(family, tmp_path / "m", dtype=torch.bfloat16))
    architecture = inspect_architecture(source)
    spans = CUTS["last"]
    operators = random_operators(spans, operator_dtype)
    export_checkpoint(source, architecture, Variant(spans, operators), tmp_path / "out")
    model = recovered(source, architecture, spans, operators, torch.bfloat16)
    verify(tmp_path / "out", model, torch.bfloat16)
    stored = {t.dtype for n, t in open_checkpoint(tmp_path / "out").tensors.items() if "ghost" in n}
    assert stored == {"F32" if operator_dtype == torch.float32 else "BF16"}


def test_cut_only_needs_no_code(checkpoint, tmp_path):
    source, architecture = checkpoint("gemma3")
    spans = CUTS["two"]
    export_checkpoint(source, architecture, Variant(spans, {}), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "gemma3_text"
    assert "auto_map" not in config
    model = recovered(source, architecture, spans, {})
    verify(tmp_path / "out", model)
    uncut = load_causal_lm(source.path, dtype=torch.float32, device=CPU)
    expected = oracle_logits(uncut, architecture.layers, spans, {}, TOKENS)
    again = load_causal_lm(tmp_path / "out", dtype=torch.float32, device=CPU)
    with torch.inference_mode():
        assert (again(TOKENS).logits - expected).abs().max() <= rounding(expected)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    source, architecture = checkpoint("llama")
    out = tmp_path_factory.mktemp("verify") / "out"
    variant = Variant(CUTS["middle"], random_operators(CUTS["middle"]))
    export_checkpoint(source, architecture, variant, out)
    return out


def test_verify_finds_another_operator(checkpoint, exported):
    """A transposed W is the mistake that a symmetric one would hide."""
    source, architecture = checkpoint("llama")
    (span,) = CUTS["middle"]
    operator = random_operators(CUTS["middle"])[span]
    model = recovered(source, architecture, (span,), {span: Repair(operator.weight_CC.T)})
    with pytest.raises(ExportError, match="does not reproduce the recovered model"):
        verify(exported, model)


def test_verify_finds_what_only_a_cache_shows(checkpoint, exported, tmp_path):
    """An operator that is left out where one token comes at a time."""
    source, architecture = checkpoint("llama")
    broken = shutil.copytree(exported, tmp_path / "broken")
    code = broken / "modeling_ghost_llama.py"
    line = "    y = module.ghost(x)\n"
    assert line in code.read_text()
    only_prompts = "    y = module.ghost(x) if x.shape[1] > 1 else x\n"
    code.write_text(code.read_text().replace(line, only_prompts))
    model = recovered(source, architecture, CUTS["middle"], random_operators(CUTS["middle"]))
    with pytest.raises(ExportError, match=r"generates the tokens \[.*\] with a cache, \[.*\] wi"):
        verify(broken, model)


def test_verify_finds_nan(checkpoint, exported, tmp_path):
    source, architecture = checkpoint("llama")
    model = recovered(source, architecture, CUTS["middle"], random_operators(CUTS["middle"]))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ExportError, match="does not reproduce"):
        verify(exported, model)


def test_verify_finds_a_lost_operator(exported, tmp_path):
    broken = shutil.copytree(exported, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "ghost_operators": []}))
    with pytest.raises(
        ExportError, match=r"unexpected tensors \['model.layers.2.ghost.linear.weight'\]"
    ):
        reload(broken, TOKENS.numpy(), dtype=torch.float32, device=CPU)


def test_only_our_code_is_run(exported, tmp_path):
    strange = shutil.copytree(exported, tmp_path / "strange")
    (strange / "more.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ExportError, match=r"more\.py.*not run"):
        reload(strange, TOKENS.numpy(), dtype=torch.float32, device=CPU)


def test_user_cache_stays_clean(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    narrow = TOKENS.numpy().astype(np.int32)
    found = reload(exported, narrow, dtype=torch.float32, device=CPU)
    assert found.logits.shape == (*TOKENS.shape, VOCAB)
    assert not (tmp_path / "cache").exists()


def test_timeout(exported, monkeypatch):
    monkeypatch.setattr("ghost_dist.export.verify.TIMEOUT_S", 0.01)
    with pytest.raises(ExportError, match="more than 0 s"):
        reload(exported, TOKENS.numpy(), dtype=torch.float32, device=CPU)
