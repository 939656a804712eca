"""Exported models in the hands of a user without ghost_dist: everything a model is used for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from families import CUTS, FAMILIES, random_operators
from tokenizers import Tokenizer, models, pre_tokenizers

from ghost_dist.export.rewrite import export_checkpoint

EVERYWHERE = ("cached_generation", "saved_again", "without_trust")
IN_DEPTH = (
    *("base_model", "gradient_checkpointing", "compiled", "split", "operator_dtypes"),
    "tokenizer",
)
DEEP_FAMILIES = ("llama", "gemma3", "gpt_neox", "mixtral", "gpt_oss")


def small_tokenizer():
    words = {word: i for i, word in enumerate(["<unk>", "some", "text", "to", "be", "split"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="session")
def results(checkpoint, tmp_path_factory):
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
        operators = random_operators(CUTS["last"])
        export_checkpoint(source, architecture, CUTS["last"], operators, root / family)
        wanted[family] = [*EVERYWHERE, *(IN_DEPTH if family in DEEP_FAMILIES else ())]
    script = Path(__file__).with_name("use_exported.py")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(root / "modules"),
    }
    subprocess.run(
        [sys.executable, "-I", str(script), str(root), json.dumps(wanted)],
        check=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    return json.loads((root / "results.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_cache(results, family):
    assert results[family]["cached_generation"] is True


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
