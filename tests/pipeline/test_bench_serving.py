"""Serving speed of dense, pruned and recovered: figures that belong to what they say; no times."""

import json
import shutil

import pytest
import torch
import transformers

from ghost_dist.errors import ConfigError, RunFolderError
from ghost_dist.pipeline.bench_serving import bench_serving, take_turns
from ghost_dist.pipeline.recover import recover
from ghost_dist.report.terminal import print_serving


def test_measured(make_config, model_folder, tmp_path, capsys):
    halves = {"selection__sublayers": "attention:1,mlp:6"}
    result = recover(make_config(**halves))
    run = tmp_path / "run"
    measured = bench_serving(run, batch=2, prompt=70, new=5, rounds=2)  # more than one window
    json.dumps(measured)

    variants = measured["variants"]
    assert {name: v["layers"] for name, v in variants.items()} == {
        "dense": 8,
        "pruned": 6,
        "recovered": 6,
    }
    assert variants["dense"]["parameters"] == result["parameters"]["before"]
    assert variants["recovered"]["parameters"] == result["parameters"]["after"]
    operator = variants["recovered"]["parameters"] - variants["pruned"]["parameters"]
    assert operator == 48 * 48
    for variant in variants.values():
        assert variant["weight_bytes"] >= 4 * variant["parameters"]  # float32, and the rotary's
        for part in ("prefill", "decode"):
            rates = variant[part]
            assert 0 < rates["low"] <= rates["median"] <= rates["high"]
    assert variants["dense"]["prefill"]["ratio"] == variants["dense"]["decode"]["ratio"] == 1.0

    kept = json.loads((run / "result.json").read_text())
    assert kept == {**result, "serving": json.loads(json.dumps(measured))}
    assert "times dense" in (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert recover(make_config(**halves))["serving"] == kept["serving"]  # nothing else was done

    print_serving(measured)
    assert f"{variants['recovered']['decode']['median']:,.1f}" in capsys.readouterr().out

    with pytest.raises(ConfigError, match="prompt 250 and new 7 are 257 tokens.*256"):
        bench_serving(run, prompt=250, new=7)
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "checkpoint")
    with pytest.raises(RunFolderError, match="no recovered checkpoint yet"):
        bench_serving(unfinished)


def test_a_run_done_again_meanwhile_keeps_its_result(make_config, text_file, tmp_path, monkeypatch):
    recover(make_config())
    measured = {"evaluation__corpora": {"other": str(text_file)}, "evaluation__window_length": 64}
    run, found = tmp_path / "run", {}

    def turns(*arguments):
        found.update(recover(make_config(**measured)))
        return take_turns(*arguments)

    monkeypatch.setattr("ghost_dist.pipeline.bench_serving.take_turns", turns)
    with pytest.raises(RunFolderError, match="was done again while its models were measured"):
        bench_serving(run, prompt=8, new=2, rounds=1)
    assert json.loads((run / "result.json").read_text()) == found
    bench_serving(run, prompt=8, new=2, rounds=1)  # a run with nothing to do changes nothing
    assert json.loads((run / "result.json").read_text()).keys() == {*found, "serving"}


def test_turns_generate_greedily_and_go_on_behind_an_end_of_text(model_folder):
    models = {
        name: transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
        for name in ("dense", "other")
    }
    with torch.no_grad():
        models["other"].model.layers[3].mlp.down_proj.weight.zero_()
        models["other"].lm_head.weight[0] *= 30  # the end of text, again and again
    ids = torch.arange(2, 14).reshape(2, 6)
    turns = take_turns(models, ids, new=7, rounds=3)
    for name, model in models.items():
        assert len(turns[name]) == 3
        tokens = ids
        with torch.inference_mode():
            for _ in range(7):
                step = model(tokens, use_cache=False).logits[:, -1].argmax(-1)
                tokens = torch.cat([tokens, step[:, None]], dim=1)
        for turn in turns[name]:
            assert torch.equal(turn.tokens, tokens[:, 6:])
            assert turn.prefill_s > 0
            assert turn.decode_s > 0
    assert (turns["other"][0].tokens == 0).any()
