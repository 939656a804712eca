"""Which layers go: planted answers through the whole stage, and what cannot be asked for."""

import json

import pytest
import transformers
from rotating import write_rotating_model

from ghost_dist.errors import ConfigError
from ghost_dist.pipeline.recover import recover
from ghost_dist.statistics.store import StatisticsStore


@pytest.fixture(scope="module")
def planted(model_folder, tmp_path_factory):
    """Eight layers, of which 0, 1 and 2 are exactly orthogonal maps: large changes of the stream
    that one matrix undoes; the others change it less and cannot be repaired exactly."""
    folder = tmp_path_factory.mktemp("planted") / "model"
    write_rotating_model(model_folder, folder, range(3))
    return folder


def selected(config, tmp_path):
    spans = recover(config, again="select")["spans"]
    record = json.loads((tmp_path / "run" / "stages" / "select.json").read_text())["outputs"]
    assert record["spans"] == spans
    return spans, record


def test_the_search_finds_what_repair_can_undo_and_the_paper_does_not(
    planted, make_config, tmp_path
):
    common = {"model__path": str(planted), "selection__spans": None, "selection__remove": 2}
    config = make_config(**common, selection__criterion="search")
    spans, record = selected(config, tmp_path)
    assert {layer for span in spans for layer in range(*span)} < {0, 1, 2}
    assert record["search"]["kl"] < 1e-4
    other = make_config(**common, output__path=str(tmp_path / "o"))
    assert recover(other, again="select")["spans"][0][0] > 2
    assert not (tmp_path / "o" / "selection.zarr").exists()


def test_the_papers_score_decides(make_config, tmp_path):
    config = make_config(selection__spans=None, selection__remove=3, selection__criterion="paper")
    spans, record = selected(config, tmp_path)
    first, *scores, last = record["scores"]
    assert first is last is None
    assert len(scores) == 4
    start = 1 + scores.index(max(scores))
    assert spans == [[start, start + 3]]
    protected = make_config(
        selection__spans=None,
        selection__remove=3,
        selection__criterion="paper",
        selection__protect=[spans[0][0]],
        output__path=str(tmp_path / "protected"),
    )
    others = recover(protected, again="select")["spans"]
    assert all(spans[0][0] not in range(*span) for span in others)


def test_a_share_and_bytes_as_targets(make_config, model_folder, tmp_path):
    """Net of the operator that comes back at the one gap."""
    model = transformers.LlamaForCausalLM.from_pretrained(model_folder)
    total = sum(parameter.numel() for parameter in model.parameters())
    layer, operator = 48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 96 + 2 * 48, 48 * 48
    for number, (remove, layers) in enumerate(
        {
            f"{100 * (1.99 * layer - operator) / total:.4f}%": 2,
            f"{100 * (2.1 * layer - operator) / total:.4f}%": 3,
            f"{4 * (3 * layer - operator)}B": 3,
            f"{4 * (3 * layer - operator + 1) / 1000}kB": 4,
        }.items()
    ):
        config = make_config(
            selection__spans=None,
            selection__remove=remove,
            selection__criterion="paper",
            output__path=str(tmp_path / f"{number}"),
        )
        spans = recover(config, again="select")["spans"]
        assert sum(stop - start for start, stop in spans) == layers, remove


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"selection__remove": 8}, "at least one must be kept: give 1 to 7"),
        ({"selection__remove": 7, "selection__protect": [1, 2]}, "give 1 to 6"),
        ({"selection__remove": 2, "selection__protect": [8]}, r"names layers \[8\]"),
        ({"selection__remove": 5, "selection__protect": [2, 5]}, "No span of 5 layers is a cand"),
        ({"selection__remove": 7}, "No span of 7 layers is a candidate with 0 protected"),
        ({"selection__remove": "99%"}, r"cannot be had: 7 of 8 layers .* 73.4% at most"),
        ({"selection__remove": "2TB"}, "cannot be had: 7 of 8 layers may go"),
    ],
)
def test_what_cannot_go_is_refused_before_anything_is_bound(make_config, tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        recover(make_config(selection__spans=None, **fields))
    config = make_config(selection__spans=None, selection__remove=2)
    recover(config, again="select")  # the same folder takes the corrected command


def test_stopped_selection_continues_from_its_ranges(make_config, tmp_path, monkeypatch):
    config = make_config(selection__spans=None, selection__remove=2)
    common = {"selection__spans": None, "selection__remove": 2}
    whole = recover(make_config(**common, output__path=str(tmp_path / "whole")), again="select")
    commit = StatisticsStore.commit
    calls = []

    def stop_at_the_third(self, range_id, sums):
        calls.append(range_id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return commit(self, range_id, sums)

    monkeypatch.setattr(StatisticsStore, "commit", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        recover(config, again="select")
    assert recover(config, again="select") == whole
    assert calls == [0, 1, 2, 2, 3]
    a, b = (
        json.loads((tmp_path / run / "stages" / "select.json").read_text())["outputs"]
        for run in ("run", "whole")
    )
    assert a["scores"] == b["scores"]
