"""The card of an export: metadata as the Hub reads them, figures of the run, how to load it."""

import json
import re
import subprocess

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.config_file import load_config
from ghost_dist.evaluation import task_rows
from ghost_dist.export.model_card import model_card
from ghost_dist.pipeline.recover import recover
from ghost_dist.spans import Span

SPANS = (Span(3, 5),)


@pytest.fixture
def source(model_folder, tmp_path):
    """A copy of the model that may be given a card and a licence."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def card_of(source, path=None, calibration="c4", result=None):
    config = load_config(
        None,
        {
            "model.path": str(path or source),
            "selection.spans": [[3, 5]],
            "calibration.source": calibration,
            "output.path": "run",
        },
    )
    variant = Variant(SPANS, {SPANS[0]: Repair()})
    return model_card(open_checkpoint(source), config, variant, result)


def test_one_and_several_layers_are_named(source):
    spans = Span(1, 2), Span(3, 4), Span(5, 6)
    config = load_config(None, {"model.path": "m", "selection.spans": "3:4", "output.path": "run"})
    for count, named in enumerate(("layer 0", "layers 0 and 2", "layers 0, 2 and 4"), 1):
        some = spans[:count]
        variant = Variant(some, {span: Repair(down_FC=torch.zeros(2, 2)) for span in some})
        card = model_card(open_checkpoint(source), config, variant, None)
        assert f" In {named} of the original down_proj was refitted." in card


def metadata(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_run_leaves_a_card_with_its_figures_and_it_loads_as_it_says(
    make_config, text_file, forked, tmp_path
):
    result = recover(
        make_config(
            evaluation__corpora={"text": str(text_file)},
            evaluation__windows=4,
            evaluation__window_length=64,
        )
    )
    folder = tmp_path / "run" / "checkpoint"
    text = (folder / "README.md").read_text()
    values = [f"{result['perplexity']['text'][v]:.2f}" for v in ("dense", "pruned", "recovered")]
    assert f"| text | {' | '.join(values)} |" in text
    found = [result["agreement"]["text"][v] for v in ("pruned", "recovered")]
    cells = [f"{one['kl']:.3f}" for one in found] + [f"{one['top1']:.1%}" for one in found]
    assert f"| text | {' | '.join(cells)} |" in text
    assert "`[3, 5)`" in text
    # The needles are beyond the positions of this model, and it answers nothing.
    assert set(result["probes"]) == {"brackets", "copying", "arithmetic"}
    assert result["unasked"][0].endswith("the model has too few positions: needle.")
    assert f"{task_rows.generation(result['generation'])}\n\n{result['unasked'][0]}" in text
    assert "Probes that say nothing" in text
    assert f"{result['parameters']['after']:,} now" in text
    assert str(tmp_path) not in text
    data = ModelCard(text).data.to_dict()  # as the Hub's own library reads it
    assert data["library_name"] == "transformers"
    assert {"ghost-dist", "custom_code", "arxiv:2605.15491"} <= set(data["tags"])
    assert "base_model" not in data  # a folder of this machine is no model of the Hub
    assert "datasets" not in data
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("PATH_OR_ID", str(folder)).replace("max_new_tokens=40", "max_new_tokens=4")
    done = subprocess.run([forked.program, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once")


def test_a_card_says_what_is_lost(source):
    found = {"questions": 48, "dense": 0.9, "pruned": 0.1, "recovered": 0.2}
    result = {key: {} for key in ("perplexity", "tasks", "generation", "refine", "fit")}
    result |= {"parameters": {"before": 2, "after": 1}, "operator": "ghost", "unasked": ["No."]}
    text = card_of(source, result=result | {"probes": {"copying": found}})
    assert "20% of copying (dense: 90%).**" in text
    assert "\nNo.\n" in text
    assert "| copying | 48 | 90% | 10% | 20% |\n" in text
    found["recovered"] = 0.8
    assert "(dense: 90%)" not in card_of(source, result=result | {"probes": {"copying": found}})


def test_plain_cut_needs_no_code(make_config, tmp_path):
    recover(make_config(operator__name="none"))
    text = (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    assert "trust_remote_code" not in text
    assert "custom_code" not in metadata(text)["tags"]
    assert "plain cut" in text
    assert json.loads((tmp_path / "run" / "result.json").read_text())["perplexity"] == {}
    assert "## Perplexity" not in text


def test_licence_and_languages_of_the_source_are_carried_over(source):
    assert "license" not in metadata(card_of(source))
    (source / "LICENSE.txt").write_text("  Apache License\n  Version 2.0, January 2004")
    assert metadata(card_of(source))["license"] == "apache-2.0"
    (source / "LICENSE.txt").write_text("COMMUNITY LICENSE AGREEMENT")
    found = metadata(card_of(source))
    assert found["license"] == "other"
    assert found["license_link"] == "LICENSE.txt"
    (source / "README.md").write_text("---\nlicense: llama3.1\nlanguage: [en, de]\n---\n# About it")
    found = metadata(card_of(source))
    assert (found["license"], found["language"]) == ("llama3.1", ["en", "de"])
    assert "About it" not in card_of(source)
    (source / "README.md").write_text("---\n: [broken\n---\n")
    assert metadata(card_of(source))["license"] == "other"


def test_hub_ids_are_named_and_paths_are_not(source, tmp_path, monkeypatch):
    found = metadata(card_of(source, "owner/model-8b"))
    assert found["base_model"] == "owner/model-8b"
    assert found["datasets"] == ["allenai/c4"]
    assert metadata(card_of(source, calibration="owner/texts:en"))["datasets"] == ["owner/texts"]
    cached = tmp_path / "hub" / "models--owner--name" / "snapshots" / "0a1b"
    cached.parent.mkdir(parents=True)
    source.rename(cached)
    assert metadata(card_of(cached))["base_model"] == "owner/name"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local" / "model").mkdir(parents=True)
    assert "base_model" not in metadata(card_of(model_copy(cached, tmp_path), "local/model"))


def model_copy(folder, tmp_path):
    target = tmp_path / "elsewhere"
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).symlink_to(path.resolve())
    return target
