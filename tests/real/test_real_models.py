"""Recovery of real pretrained LLMs, where launch/real_models.sh has put them."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file

import ghost_dist
from ghost_dist.assets.stdlib_text import (
    CALIBRATION_TOPICS,
    DOCSTRING_MODULES,
    docstring_text,
    reference_text,
)
from ghost_dist.evaluation import task_rows
from ghost_dist.evaluation.probes import probe, shares
from ghost_dist.real_models import REAL_MODELS, cache_folder

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]
PROMPT = "A list is a mutable sequence, and a tuple"


@pytest.fixture(scope="module", params=REAL_MODELS)
def source(request):
    folder = cache_folder() / request.param
    if not folder.exists():
        pytest.skip(f"no {folder}: bash launch/real_models.sh {request.param}")
    return folder


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    """A quarter of the layers replaced by the paper's operator, fitted on 4,096 tokens."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "reference.txt").write_text(reference_text(CALIBRATION_TOPICS), encoding="utf-8")
    (folder / "docstrings.txt").write_text(docstring_text(DOCSTRING_MODULES), encoding="utf-8")
    num_layers = transformers.AutoConfig.from_pretrained(source).num_hidden_layers
    start = num_layers // 2 - 3
    return ghost_dist.recover(
        source,
        spans=[(start, start + num_layers // 4)],
        operator="ghost",
        out=folder / "RUN",
        settings={
            "model.dtype": "float32",
            "calibration.source": str(folder / "reference.txt"),
            "calibration.windows": 16,
            "calibration.window_length": 256,
            "operator.features": "stream",
            "operator.choose": "residual",
            "evaluation.corpora": {"docstrings": str(folder / "docstrings.txt")},
            "evaluation.windows": 2,
            "evaluation.window_length": 256,
        },
    )


@pytest.fixture(scope="module")
def by_hand(source, run):
    """The uncut model without those layers, `x W` before what follows them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    [span] = run.spans
    kept = [i for i in range(model.config.num_hidden_layers) if not span.start <= i < span.stop]
    layers = [model.model.layers[i] for i in kept]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(layers)
    config = copy.deepcopy(model.config)
    if types := getattr(config, "layer_types", None):
        config.layer_types = [types[i] for i in kept]
    config.num_hidden_layers = len(kept)
    model.config = model.model.config = config
    [file] = (run.path / "operators").iterdir()
    linear = load_file(file)["linear"].to(torch.bfloat16).float()  # as it is exported
    layers[span.start].register_forward_pre_hook(
        lambda _, arguments: (arguments[0] @ linear, *arguments[1:])
    )
    return model.eval()


@pytest.fixture(scope="module")
def reloaded(run):
    return run.load_model(dtype="float32").eval()


@torch.inference_mode()
def test_the_checkpoint_is_the_recovered_model(source, by_hand, reloaded):
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    expected, got = by_hand(**prompt).logits, reloaded(**prompt).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    greedy = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(reloaded.generate(**prompt, **greedy), by_hand.generate(**prompt, **greedy))


def test_probes_are_in_reach_and_those_of_the_cut_made_by_hand(source, run, by_hand):
    found = run.result["probes"]
    assert min(of["dense"] for of in found.values()) > task_rows.ANSWERS
    answers = shares({"dense": probe(by_hand, transformers.AutoTokenizer.from_pretrained(source))})
    for name, of in found.items():
        assert of["pruned"] < of["dense"]
        assert of["recovered"] == pytest.approx(answers[name]["dense"], abs=1.5 / of["questions"])


def test_recovered_is_better_than_cut_on_other_text(run):
    value = run.perplexity["docstrings"]
    assert value["dense"] < value["recovered"] < value["pruned"]


def test_the_tokenizer_gives_back_what_it_reads(source):
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    text = "In 1998, 12 of  345 caf\u00e9s\n\n  were \u4f60\u597d.\t<|im_start|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    config = transformers.AutoConfig.from_pretrained(source)
    assert tokenizer.bos_token_id == config.bos_token_id
    assert tokenizer.eos_token_id == config.eos_token_id
    assert len(tokenizer) == config.vocab_size
    starts_with_bos = tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id
    assert starts_with_bos == (source.name == "gemma3-270m")
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert [token for token in tokens if token.isdigit()] == list("199812345")
