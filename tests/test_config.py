"""Configuration: what a user may write, and what they are told when it is wrong."""

import pytest
import yaml

from ghost_dist.config_file import (
    config_from_tree,
    config_tree,
    config_yaml,
    decisive_tree,
    differing_fields,
    load_config,
    make_config,
    parse_set,
    shown_tree,
)
from ghost_dist.durable import fingerprint
from ghost_dist.errors import ConfigError
from ghost_dist.ridge import AbsoluteRidge, RelativeRidge
from ghost_dist.spans import Span

MINIMAL = {"model.path": "m", "selection.remove": 3, "output.path": "r"}
TARGET = {"selection.remove": None}


def test_file_and_overrides_make_one_configuration(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: m}\nselection: {spans: [[11, 18]]}\noutput: {path: r}\n"
        "operator: {ridge: {absolute: 1e-6}}\n"
    )
    config = load_config(path, {"calibration.windows": 64})
    assert config.selection.spans == (Span(11, 18),)
    assert config.operator.ridge == AbsoluteRidge(absolute=1e-6)
    assert config.calibration.windows == 64


@pytest.mark.parametrize(
    ("in_file", "given", "left"),
    [
        ("spans: 3:5", {"remove": 7}, {"remove": 7}),
        ("spans: 3:5, sublayers: [mlp:9]", {"target": "kv 60%"}, {"target": "kv 60%"}),
        ("remove: 7", {"spans": "3:5"}, {"spans": (Span(3, 5),)}),
        ("spans: 3:5", {"sublayers": "mlp:9"}, {"spans": (Span(3, 5),), "sublayers": ("mlp:9",)}),
        ("remove: 7", {"max_spans": 1}, {"remove": 7}),
    ],
)
def test_what_goes_is_as_the_command_line_says(tmp_path, in_file, given, left):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: m}}\nselection: {{{in_file}}}\noutput: {{path: r}}\n")
    config = load_config(path, {f"selection.{key}": value for key, value in given.items()})
    of = {key: getattr(config.selection, key) for key in ("remove", "target", "spans", "sublayers")}
    assert {key: value for key, value in of.items() if value} == left


def test_a_plan_needs_no_folder(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\nselection: {remove: 3}\n")
    assert make_config(path, runs=False).output.path == "."
    assert make_config(path, runs=False, out="r").output.path == "r"
    with pytest.raises(ConfigError, match=r"output\.path"):
        make_config(path)


def test_tree_round_trips_through_yaml():
    config = load_config(None, {**MINIMAL, **TARGET, "selection.spans": "3:5,7:9"})
    assert config_from_tree(yaml.safe_load(yaml.safe_dump(config_tree(config)))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.pth": "x"}, r"model\.pth.*did you mean model.path"),
        ({"calbration.windows": 3}, "did you mean calibration"),
        ({"operator.name": "ghst"}, "ghst.*Did you mean ghost"),
        ({"selection.remove": 0}, r"selection\.remove.*got 0"),
        ({"selection.remove": None}, "which layers go"),
        ({"selection.target": "kv 60%"}, "remove and target each say .* give one of them"),
        ({"selection.spans": "3:5"}, "remove and spans each say .* give one of them"),
        ({"selection.sublayers": "mlp:3"}, "remove and sublayers each say .* give one of them"),
        ({**TARGET, "selection.target": "kv 60%", "selection.spans": "3:5"}, "give one of them"),
        ({**TARGET, "selection.target": "speedup 1"}, "give speedup 1.3"),
        ({**TARGET, "selection.target": "speedup 1.3 training"}, "give speedup 1.3"),
        ({**TARGET, "selection.target": "kv 100%"}, "kv 60% .more than 0, less than 100"),
        ({**TARGET, "selection.target": "kv 0%"}, "kv 60% .more than 0, less than 100"),
        ({**TARGET, "selection.target": "bytes 20XB"}, "or bytes 20GB"),
        ({"selection.units": "auto"}, "selection.units: what it asks for .* is gone. Remove"),
        ({"operator.rank": 4}, "operator.rank: what it asks for .* is gone. Remove"),
        ({"operator.name": "replaceme"}, "got 'replaceme', .* It was of .* is gone: give fold."),
        ({"selection.criterion": "cosine"}, "got 'cosine', .* is gone: give search, or paper."),
        ({"selection.criterion": "recoverability"}, "give search .*max_spans=1.*, or paper."),
        ({"selection.max_length": 2}, "selection.max_length: what it asks for .* is gone. Remove"),
        ({"operator.name": "low-rank"}, "got 'low-rank', .* It was of .* is gone: give ghost."),
        ({**TARGET, "selection.target": "kv 4GB"}, "give speedup 1.3"),
        ({**TARGET, "selection.target": "bytes 20%"}, "give speedup 1.3"),
        ({**TARGET, "selection.target": "1.3"}, "give speedup 1.3"),
        ({**TARGET, "selection.target": "bytes 12"}, "bytes 20GB .units: B, kB"),
        ({"selection.remove": "1KB"}, "units: B, kB .not KB., MB"),
        (
            {"selection.pareto": "-1"},
            "'-1' is no size or target: .* layers .7.* .20%.*4GB.*, or speedup",
        ),
        ({"selection.pareto": ""}, "'' is no size or target"),
        ({"selection.pareto": "2,,4"}, "pareto: '' is no size or target"),
        ({"selection.pareto": [2, "bytes 1KB"]}, "'bytes 1KB' is no size or target: .* kB .not KB"),
        ({"selection.spans": [[3]]}, "pair of whole numbers"),
        ({**TARGET, "selection.spans": []}, "spans is empty"),
        ({**TARGET, "selection.spans": "5:3"}, "empty"),
        ({"operator.ridge": {"absolute": -1}}, "absolute"),
        ({"operator.folds": 1}, r"operator\.folds"),
        ({"engine.device": "gpu"}, r"engine\.device"),
        ({"engine.data_parallel": 2}, "shares what kind=streaming reads, and kind is auto"),
        ({"engine.kind": "tensor_parallel", "engine.data_parallel": 2}, "kind is tensor_parallel"),
        ({"evaluation.corpora": {"a b": "f"}}, "letters, digits"),
        ({"model": "x"}, "model"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, {**MINIMAL, **changes})


def test_missing_sections_are_named():
    with pytest.raises(ConfigError, match=r"MODEL(.|\n)*--remove(.|\n)*--out"):
        load_config(None, {})


@pytest.mark.parametrize("text", ["calibration.windows", "windows=3", "a.b=[1"])
def test_set_needs_section_field_value(text):
    with pytest.raises(ConfigError, match="--set") as raised:
        parse_set(text)
    assert "unicode" not in str(raised.value)


def test_set_reads_yaml_and_exponents():
    assert parse_set("operator.ridge={absolute: 1e-6}") == ("operator.ridge", {"absolute": 1e-6})
    assert parse_set("model.path=1e") == ("model.path", "1e")
    assert parse_set("operator.ridge={relative: 2.5}") == ("operator.ridge", {"relative": 2.5})
    assert parse_set("calibration.windows=64") == ("calibration.windows", 64)


def test_a_span_is_no_number_in_base_60(tmp_path):
    key, value = parse_set("selection.spans=11:18")
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\nselection: {spans: 11:18}\noutput: {path: r}\n")
    expected = (Span(11, 18),)
    assert load_config(path, {}).selection.spans == expected
    assert load_config(None, {**MINIMAL, **TARGET, key: value}).selection.spans == expected
    with pytest.raises(ConfigError, match=r"spans.*pairs, or 11:18 \(got 678\)"):
        load_config(None, {**MINIMAL, key: 678})


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "\xff"])
def test_broken_file_is_named(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path, {})


def test_differences_name_the_field():
    a = config_tree(load_config(None, MINIMAL))
    b = config_tree(load_config(None, {**MINIMAL, "calibration.windows": 7}))
    assert differing_fields(a, b) == ["calibration.windows: 32 in RUN, 7 now"]
    assert differing_fields(a, a) == []


def test_fingerprint_ignores_key_order_only():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_reduction_needs_replicas():
    minimal = {**MINIMAL, "selection.criterion": "paper"}
    alone = {**minimal, "engine.reduction": "all-reduce"}
    with pytest.raises(ConfigError, match=r"^engine\.reduction=all-reduce is between.*=ordered\.$"):
        load_config(None, alone)
    config = load_config(None, {**alone, "engine.replicas": 2})
    assert config.on_cluster
    # Which bits come out depends on it, so a run is not continued under the other.
    ordered = load_config(None, {**minimal, "engine.replicas": 2})
    assert decisive_tree(config) != decisive_tree(ordered)


@pytest.mark.parametrize("before", ["auto", {"absolute": 1e-6}, None])
def test_what_is_below_a_field_takes_its_place(before):
    changes = {} if before is None else {"operator.ridge": before}
    config = load_config(None, {**MINIMAL, **changes, "operator.ridge.relative": 0.1})
    assert config.operator.ridge == RelativeRidge(relative=0.1)


def test_names_are_added_to_those_of_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("evaluation: {corpora: {a: a.txt}}\n")
    config = load_config(path, {**MINIMAL, "evaluation.corpora.b": "b.txt"})
    assert config.evaluation.corpora == {"a": "a.txt", "b": "b.txt"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"operator.ridge.absolut": 1, "operator.ridge.absolute": 1, "operator.ridg": 1},
            "Unknown configuration key operator.ridg: did you mean operator.ridge?",
        ),
        (
            {"operator.ridge.relative": -1},
            "operator.ridge.relative: got -1, expected greater than 0.",
        ),
        (
            {"operator.ridge": 0.1},
            "operator.ridge: expected auto, {relative: 0.1} or {absolute: 1e-6} (got 0.1).",
        ),
        ({"engine.batch": "x"}, "engine.batch: got 'x', expected 'auto' or a whole number."),
        ({"model.path.x": 1}, 'model.path: got {"x": 1}, expected text.'),
        ({"model.path": None}, "model.path: got null, expected text."),
        ({"model.path": ""}, "model.path: got '', expected text of at least 1 character."),
        (
            {"calibration.window_bos": [True]},
            "calibration.window_bos: got [true], expected 'auto' or true or false.",
        ),
        ({"evaluation.limit": 1.5}, "evaluation.limit: got 1.5, expected a whole number."),
        ({"engine.device": "x"}, "engine.device: got 'x', expected auto, cpu, cuda or cuda:0."),
        (
            {"selection.sublayers": True},
            (
                "selection.sublayers: Sublayer 'true' is not of the form attention:LAYER or "
                "mlp:LAYER (counted from 0), for example attention:5,mlp:7 (got true)."
            ),
        ),
        (
            {"model": "x", "model.path": "y"},
            "model.path: model holds 'x', expected fields, such as path.",
        ),
        ({"evaluation.tasks": "arc"}, "evaluation.tasks: got 'arc', expected a list."),
        (
            {"evaluation.corpora": "a.txt"},
            "evaluation.corpora: got 'a.txt', expected names and values, such as {name: FILE}.",
        ),
        (
            {**TARGET, "selection.spans": "10:5"},
            "selection: Span [10, 5) is empty: its stop must be greater than its start.",
        ),
        (
            {"selection.spans": "x"},
            (
                "selection.spans: Span 'x' is not of the form start:stop (half open, counted from "
                "0), for example 11:18 for layers 11 to 17, or 3:5,11:18 for two spans (got 'x')."
            ),
        ),
    ],
)
def test_a_mistake_is_told_once_and_without_words_of_pydantic(changes, said):
    with pytest.raises(ConfigError) as caught:
        load_config(None, {**{k: v for k, v in MINIMAL.items() if k not in changes}, **changes})
    assert str(caught.value) == said


def test_yaml_quotes_what_would_be_read_as_a_number():
    config = load_config(None, {**MINIMAL, "model.revision": "12345e6", "model.path": "1e-6"})
    tree = yaml.safe_load(config_yaml(config))
    assert tree["model"]["revision"] == "12345e6"
    assert parse_set(f"a.b={config_yaml(config).decode()}")[1] == config_tree(config)


def test_what_is_gone_is_shown_as_it_stands(tmp_path):
    file, gone = tmp_path / "config.yaml", {"name": "low-rank", "rank": 8}
    tree = config_tree(load_config(None, MINIMAL))
    old = {**tree, "operator": {**tree["operator"], **gone}}
    old["selection"] = {**tree["selection"], "criterion": "cosine"}
    file.write_text(yaml.safe_dump(old))
    assert shown_tree(file, {"output.path": "moved"}) == {
        **old,
        "output": {**old["output"], "path": "moved"},
    }
    file.write_text(yaml.safe_dump({**old, "operator": {**gone, "folds": 1}}))
    with pytest.raises(ConfigError, match="operator.folds"):
        shown_tree(file, {})


def test_fields_of_earlier_versions_are_left_out_where_they_asked_for_nothing():
    tree = config_tree(load_config(None, MINIMAL))
    tree["selection"] |= {"units": "layers", "min_length": 1, "max_length": None}
    tree["operator"] |= {"heal": False, "rank": None}
    assert config_from_tree(tree) == load_config(None, MINIMAL)
