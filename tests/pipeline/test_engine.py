"""One function chooses the engine, for ``plan`` and ``recover``; a run keeps what it began with."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from headers_only import write_headers
from run_files import operators

from ghost_dist.config_file import config_from_tree, load_config
from ghost_dist.demo import PICO
from ghost_dist.devices import SHARE_OF_FREE_MEMORY
from ghost_dist.errors import ConfigError
from ghost_dist.pipeline import engine, fitting, inputs
from ghost_dist.pipeline.automatic import compute_dtype
from ghost_dist.pipeline.compare import compare
from ghost_dist.pipeline.inputs import open_inputs
from ghost_dist.pipeline.recover import recover
from ghost_dist.planning import plan as planning
from ghost_dist.planning.plan import plan_run
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import RunFolder

SHAPES = {
    "8b": (
        transformers.LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "70b": (
        transformers.LlamaConfig,
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "mixture": (
        transformers.MixtralConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
        },
    ),
}
SETTINGS = {
    "default": {"selection.remove": 5, "selection.criterion": "paper"},
    "spans": {"selection.spans": [[10, 15]], "operator.choose": "residual"},
    "whole": {"selection.spans": [[10, 15], [20, 22]], "operator.refit": "sequential"},
}
MEMORY_GB = (4, 8, 16, 36, 80, 141, 200, 400)
BETWEEN_GB = range(32, 40)  # where 8b was planned resident and run offloaded, once


@pytest.fixture(scope="module", params=SHAPES)
def big(request, tmp_path_factory):
    config_class, sizes = SHAPES[request.param]
    config = config_class(**sizes)
    name = config_class.__name__.replace("Config", "ForCausalLM")
    folder = write_headers(tmp_path_factory.mktemp("big") / request.param, config, name=name)
    for file in PICO.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def have(monkeypatch):
    """Let the device have so much free memory."""

    def have(nbytes):
        monkeypatch.setattr(engine, "free_bytes", lambda _: int(nbytes))

    return have


def once(function):
    """The function, asked the first time only."""
    found = []

    def remembered(*arguments, **options):
        if not found:
            found.append(function(*arguments, **options))
        return found[0]

    return remembered


def outcome(work):
    """What it returns, or the words in which it refuses; None if it was stopped."""
    try:
        return work()
    except StopIteration:
        return None
    except ConfigError as error:
        return str(error)


@pytest.mark.model  # tens of billions of parameters, on the meta device
@pytest.mark.parametrize("setting", SETTINGS)
def test_plan_and_recover_choose_alike(big, tmp_path, have, monkeypatch, setting):
    """Over shapes, settings and memories of a GPU; where one finds no engine, so does the other."""
    opened = once(inputs.open_model)
    for module in (planning, inputs):
        monkeypatch.setattr(module, "open_device", lambda _: torch.device("cuda"))
        monkeypatch.setattr(module, "open_model", opened)
    monkeypatch.setattr(inputs, "fit_room", lambda _: 1 << 40)
    monkeypatch.setattr(engine, "device_name", lambda _: "GPU X")
    chosen = []

    def stop(run, costs, choice, folder):
        chosen.append(choice)
        raise StopIteration

    monkeypatch.setattr(planning, "_disk", stop)  # what comes after the choice
    for name in ("refittable_layers", "_texts"):
        # Once for all memories: none of them asks for it.
        monkeypatch.setattr(planning, name, once(getattr(planning, name)))
    monkeypatch.setattr(engine, "model_sizes", once(engine.model_sizes))
    text = tmp_path / "text.txt"
    text.write_text("some words of a text\n" * 9)
    config = load_config(
        None,
        {
            "model.path": str(big),
            "model.dtype": "bfloat16",
            "calibration.source": str(text),
            "evaluation.corpora": {"text": str(text)},
            "evaluation.window_length": 8,
            "output.path": str(tmp_path / "run"),
            **SETTINGS[setting],
        },
    )
    opened = open_inputs(config, Reporter())
    whole = (config.needs_whole_model or (None,))[0]
    kinds = set()
    for gigabytes in (*MEMORY_GB, *(BETWEEN_GB if big.name == "8b" else ())):
        have(gigabytes * 1e9)
        expected = outcome(lambda: engine.decide(opened, whole=whole))
        got = outcome(lambda: plan_run(config))
        assert (chosen.pop() if got is None else got) == expected, gigabytes
        kinds.add(expected if isinstance(expected, str) else (expected.kind, expected.fits))
    assert len(kinds) > 1, "the memories tell nothing apart"


def little_for_resident(config):
    """Free bytes that are a little less than the whole model needs."""
    plenty = engine.decide(open_inputs(config, Reporter()))
    assert plenty.kind == "resident"
    return max(plenty.device_bytes.values()) / SHARE_OF_FREE_MEMORY * 0.99


def streamed(run):
    return "layers-read" in (run / "events.jsonl").read_text()


def test_a_streamed_run_goes_on_streaming_whatever_is_free(make_config, tmp_path, have):
    config = make_config()
    have(little_for_resident(config))
    recover(config, again="calibrate")
    assert streamed(tmp_path / "run")
    (tmp_path / "run" / "events.jsonl").unlink()
    have(1e12)
    recover(config)
    assert json.loads((tmp_path / "run" / "stages" / "engine.json").read_text())["outputs"] == {
        "kind": "streaming",
        "driver": "cpu",
        "fit_room": 0,
        "dtype": "float32",
    }
    whole = make_config(output__path=str(tmp_path / "whole"))
    recover(whole, again="solve")
    assert not streamed(tmp_path / "whole")
    assert operators(tmp_path / "run") == operators(tmp_path / "whole")


def test_a_resident_run_that_does_not_fit_any_more_says_so_and_can_go_on(
    make_config, tmp_path, have
):
    config = make_config()
    recover(config, again="calibrate")
    have(little_for_resident(config))
    with pytest.raises(ConfigError) as refused:
        recover(config)
    for words in ("began with the whole model on cpu", "GB free", "engine.kind=streaming"):
        assert words in str(refused.value)
    recover(make_config(engine__kind="streaming"), again="solve")
    have(1e12)
    recover(make_config(output__path=str(tmp_path / "whole")), again="solve")
    assert operators(tmp_path / "run") == operators(tmp_path / "whole")


def test_a_run_that_needs_the_model_whole_has_it_so_with_a_warning(make_config, tmp_path, have):
    config = make_config(refine__steps=2, operator__name="ghost-joint")
    have(1_000_000)
    recover(config, again="calibrate")
    assert not streamed(tmp_path / "run")
    assert "refine.steps=2 needs the model whole" in (tmp_path / "run" / "events.jsonl").read_text()


def test_compare_says_that_the_model_does_not_fit(make_config, text_file, tmp_path, have):
    config = make_config(
        selection__spans=None,
        selection__remove=2,
        evaluation__corpora={"a": str(text_file)},
        evaluation__windows=2,
        evaluation__window_length=32,
    )
    have(1_000_000)
    compare(config, [2], ["none", "refine"], ["paper"])
    assert "the row refine needs the model whole" in (tmp_path / "run" / "events.jsonl").read_text()


def test_where_fits_go_is_decided_once_and_not_by_free_memory(make_config, tmp_path, monkeypatch):
    """Bits of operators depend on it."""
    gpu = torch.device("cuda:0")
    for total, free, expected in ((1000, 0, "cuda"), (800, 1000, "cpu")):
        monkeypatch.setattr(fitting, "total_bytes", lambda _, total=total: total)
        monkeypatch.setattr(fitting, "free_or_cached_bytes", lambda _, free=free: free)
        here = fitting.FitHere(None, SimpleNamespace(norm_eps=0.0), 4, gpu, fitting.fit_room(gpu))
        assert here._device(None, 100).type == expected  # 4 folds and 3 copies more
    opened = open_inputs(make_config(engine__kind="streaming"), Reporter())
    opened = replace(opened, fit_room=800)
    with RunFolder(opened.config) as run:
        run.begin()
        engine.record_engine(engine.with_engine(opened, run, Reporter()), run)
        later = engine.with_engine(replace(opened, fit_room=500), run, Reporter())
    assert later.fit_room == 800


@pytest.mark.parametrize(
    ("capabilities", "stored", "device", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16, "cpu", torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16, "cpu", torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.bfloat16, "cpu", torch.float32),
        ({}, torch.bfloat16, "cpu", torch.float32),
        ({"avx512_bf16": True}, torch.float16, "cpu", torch.float32),
        ({"avx512_bf16": True}, torch.float32, "cpu", torch.float32),
        ({}, torch.float16, "cuda", torch.float16),
    ],
)
def test_auto_is_half_precision_where_that_is_fast(
    monkeypatch, capabilities, stored, device, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    config = config_from_tree(
        {"model": {"path": str(PICO)}, "selection": {"remove": 2}, "output": {"path": "RUN"}}
    )
    assert compute_dtype(config, SimpleNamespace(dtype=stored), torch.device(device)) == expected


def test_a_run_goes_on_in_the_dtype_that_it_began_with(make_config, tmp_path, monkeypatch):
    """On a CPU of another kind, too; its operators are those of a run on the first alone."""
    fast, slow = {"avx512_bf16": True}, {"avx512_bf16": False}
    fields = {"model__path": str(PICO), "selection__spans": [[5, 7]], "model__dtype": "auto"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: fast)
    calm = make_config(**fields, output__path=str(tmp_path / "calm"))
    recover(calm, again="solve")
    config = make_config(**fields)
    recover(config, again="calibrate")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: slow)
    recover(config, again="solve")
    assert operators(tmp_path / "run") == operators(tmp_path / "calm")
