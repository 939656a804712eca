"""Exported models in the hands of a user without ghost_dist: everything a model is used for."""

import importlib.util
import json

import pytest
import transformers
from families import CUTS, FAMILIES, HALVES, random_operators
from tokenizers import Tokenizer, models, pre_tokenizers

from ghost_dist.checkpoint.load import load_tokenizer
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.find_halves import with_halves
from ghost_dist.export.rewrite import export_checkpoint

EVERYWHERE = ("saved_again", "without_trust")
IN_DEPTH = (
    *("base_model", "gradient_checkpointing", "compiled", "split", "operator_dtypes"),
    *("tokenizer", "left_padded", "as_a_backend"),
)
ONCE = ("static_cache", "assisted", "placed", "lora", "text_pipeline", "quantised")
WITH_HALVES = (
    *("saved_again", "base_model", "compiled", "split", "left_padded", "static_cache", "placed"),
    "gradient_checkpointing",
)
DEEP_FAMILIES = ("llama", "gemma3", "gpt_neox", "mixtral", "gpt_oss")
HAS_PEFT = importlib.util.find_spec("peft") is not None


def small_tokenizer():
    words = {word: i for i, word in enumerate(["<unk>", "some", "text", "to", "be", "split"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="session")
def results(checkpoint, use_exported, tmp_path_factory):
    root = tmp_path_factory.mktemp("use")
    wanted = {}
    for family in FAMILIES:
        source, architecture = checkpoint(family)
        if family in DEEP_FAMILIES:
            small_tokenizer().save_pretrained(source.path)
            path = source.path / "tokenizer_config.json"
            content = json.loads(path.read_text())
            del content["tokenizer_class"]  # then transformers goes by the model type
            path.write_text(json.dumps(content))
        words = load_tokenizer(source.path) if family in DEEP_FAMILIES else None
        operators, out = random_operators(CUTS["last"]), root / family
        export_checkpoint(
            source, architecture, Variant(CUTS["last"], operators), out, tokenizer=words
        )
        wanted[family] = [*EVERYWHERE, *(IN_DEPTH if family in DEEP_FAMILIES else ())]
    spans, sublayers = HALVES["mixed"]
    for family in ("llama", "gemma3"):  # layers without attention or MLP
        source, architecture = checkpoint(family)
        variant = Variant(spans, random_operators(spans), sublayers=sublayers)
        architecture = with_halves(source, architecture)
        export_checkpoint(source, architecture, variant, root / f"{family}-halves")
        wanted[f"{family}-halves"] = list(WITH_HALVES)
        if HAS_PEFT:
            wanted[f"{family}-halves"].append("lora")
    wanted["llama"] += [check for check in ONCE if HAS_PEFT or check != "lora"]
    return use_exported(root, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_reload(results, family):
    assert results[family]["saved_again"] == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_without_trust_nothing_is_loaded_silently(results, family):
    assert "trust_remote_code=True" in results[family]["without_trust"]


@pytest.mark.parametrize("family", DEEP_FAMILIES)
def test_base_model(results, family):
    assert results[family]["base_model"] == 0.0


@pytest.mark.parametrize("family", DEEP_FAMILIES)
def test_gradient_checkpointing(results, family):
    assert results[family]["gradient_checkpointing"] < 1e-7


@pytest.mark.parametrize("family", DEEP_FAMILIES)
def test_compile(results, family):
    assert results[family]["compiled"] < 1e-5


@pytest.mark.parametrize("family", DEEP_FAMILIES)
def test_split_over_devices(results, family):
    assert results[family]["split"] == 0.0


@pytest.mark.parametrize("family", DEEP_FAMILIES)
def test_float32_operators_stay_so(results, family):
    dtypes = results[family]["operator_dtypes"]
    assert dtypes == {"ghost": ["torch.float32"], "rest": ["torch.bfloat16"]}


@pytest.mark.parametrize("family", DEEP_FAMILIES)
def test_tokenizer_is_the_original(checkpoint, results, family):
    source, _ = checkpoint(family)
    original = transformers.AutoTokenizer.from_pretrained(source.path)
    ids = original("some text to be split")["input_ids"]
    assert results[family]["tokenizer"] == [type(original).__name__, ids]


@pytest.mark.parametrize("family", DEEP_FAMILIES)
def test_left_padded_batch(results, family):
    assert results[family]["left_padded"] is True


@pytest.mark.parametrize("family", DEEP_FAMILIES)
def test_attention_backend_such_as_vllm(results, family):
    """3 of 6 layers are left, which must know their numbers; the last norm has an operator."""
    calls, difference = results[family]["as_a_backend"]
    assert calls == [0, 1, 2]
    assert difference < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_without_attention_or_mlp(results, family):
    found = results[f"{family}-halves"]
    if HAS_PEFT:
        changed, lost = found.pop("lora")
        assert changed > 0.01
        assert lost < 1e-5 + 1e-4 * changed
    assert found.pop("compiled") < 1e-5
    assert found.pop("gradient_checkpointing") < 1e-7
    assert found == {
        **dict.fromkeys(("saved_again", "base_model", "split", "placed"), 0.0),
        **dict.fromkeys(("left_padded", "static_cache"), True),
    }


def test_static_cache(results):
    assert results["llama"]["static_cache"] is True


def test_assisted_decoding(results):
    assert results["llama"]["assisted"] is True


def test_device_maps(results):
    assert results["llama"]["placed"] == 0.0


@pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
def test_adapters_are_trained_merged_and_saved(results):
    changed, lost = results["llama"]["lora"]
    assert changed > 0.01
    assert lost < 1e-5 + 1e-4 * changed


def test_text_generation_pipeline(results):
    found, expected = results["llama"]["text_pipeline"]
    assert found == expected


def test_quantised_operator(results):
    """Quantised modules have no parameters that say what to compute in."""
    assert results["llama"]["quantised"] < 0.2
