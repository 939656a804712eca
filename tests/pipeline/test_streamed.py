"""``engine.kind=streaming`` through the whole run: the same result as with the model in memory."""

from types import SimpleNamespace

import pytest
import torch
from run_files import events, operators

from ghost_dist.config_file import load_config
from ghost_dist.errors import ConfigError, RunFolderError
from ghost_dist.pipeline import inputs as run_inputs
from ghost_dist.pipeline.collectors import sums_of_range
from ghost_dist.pipeline.offloading import open_offloaded_engine
from ghost_dist.pipeline.recover import recover
from ghost_dist.progress import Reporter


@pytest.mark.parametrize(
    "fields",
    [
        {"operator__name": "ghost"},
        {
            "operator__name": "auto",
            "operator__choose": "kl",
            "operator__features": "auto",
            "selection__spans": None,
            "selection__remove": 3,
        },
        {"operator__name": "ghost", "operator__choose": "kl", "operator__features": "auto"},
        {"operator__name": "fold", "selection__spans": None, "selection__remove": 3},
        {"operator__name": "none", "selection__spans": [[0, 2]]},
        {
            "operator__name": "ghost-joint",
            "operator__refit": "sequential",
            "selection__spans": [[1, 2], [4, 6]],
        },
        {
            "operator__name": "ghost",
            "selection__spans": [[4, 5]],
            "selection__sublayers": "attention:1,mlp:2,mlp:6",
        },
    ],
    ids=lambda fields: fields.get("selection__sublayers", fields["operator__name"]),
)
def test_a_streamed_run_ends_as_a_resident_one(make_config, text_file, tmp_path, fields):
    results = {}
    for kind in ("resident", "streaming"):
        config = make_config(
            **fields,
            engine__kind=kind,
            evaluation__corpora={"a": str(text_file), "b": str(text_file)},
            evaluation__windows=3,
            evaluation__window_length=32,
            output__path=str(tmp_path / kind),
        )
        results[kind] = recover(config)
    expected, got = results["resident"], results["streaming"]
    assert operators(tmp_path / "streaming") == operators(tmp_path / "resident")
    assert got["spans"] == expected["spans"]
    assert got["chosen"] == expected["chosen"]
    for corpus, of_variant in expected["perplexity"].items():
        assert got["perplexity"][corpus] == pytest.approx(of_variant, rel=1e-5)
        for variant, figures in expected["agreement"][corpus].items():
            assert figures["kl"] > 1e-4
            assert got["agreement"][corpus][variant] == pytest.approx(figures, rel=1e-3)
    for old, new in zip(expected["candidates"], got["candidates"], strict=True):
        if old.get("kl") is None:
            assert new.get("kl") is None
        else:
            assert new["kl"] == pytest.approx(old["kl"], rel=1e-4)
    assert got["reload_max_abs_difference"] < 1e-4
    for name in ("config.json", "model.safetensors"):
        folders = [tmp_path / kind / "checkpoint" for kind in results]
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    assert not list((tmp_path / "streaming").glob("streams-*"))
    for kind, left_out in (("resident", 0), ("streaming", 1)):
        record = tmp_path / kind / "report.html", tmp_path / kind / "checkpoint" / "README.md"
        for page in record:
            assert (
                page.read_text().count("texts were not continued and probes not asked") == left_out
            )


def test_every_stage_reads_the_layers_it_needs_once(make_config, tmp_path, model_folder):
    from ghost_dist.checkpoint.reader import open_checkpoint

    recover(
        make_config(engine__kind="streaming", selection__spans=None, selection__remove=2),
        again="calibrate",
    )
    read = {row["stage"]: row["bytes"] for row in events(tmp_path / "run", "layers-read")}
    spans = recover(
        make_config(engine__kind="streaming", selection__spans=None, selection__remove=2)
    )["spans"]
    tensors = open_checkpoint(model_folder).tensors

    def below(stop):
        return sum(
            tensor.nbytes
            for name, tensor in tensors.items()
            if "embed" in name or any(f"layers.{layer}." in name for layer in range(stop))
        )

    assert read == {"select": below(8), "calibrate": below(spans[0][1])}


def test_streams_that_a_kill_left_behind_the_last_range_go(make_config, tmp_path):
    config = make_config(engine__kind="streaming")
    recover(config, again="calibrate")
    left = tmp_path / "run" / "streams-calibrate" / "arrays"
    left.mkdir(parents=True)
    recover(config, again="calibrate")  # every range is there
    assert not left.parent.exists()


def test_a_damaged_state_is_told_and_the_stage_begins_again(make_config, tmp_path, monkeypatch):
    from ghost_dist.engines.offloaded import OffloadedModel

    calm = make_config(engine__kind="streaming", output__path=str(tmp_path / "calm"))
    recover(calm, again="solve")
    running = OffloadedModel.running

    def stopped(self, layer, *arguments, **options):
        if layer == 4:
            raise KeyboardInterrupt
        return running(self, layer, *arguments, **options)

    monkeypatch.setattr(OffloadedModel, "running", stopped)
    config = make_config(engine__kind="streaming")
    with pytest.raises(KeyboardInterrupt):
        recover(config, again="solve")
    monkeypatch.undo()
    arrays = tmp_path / "run" / "streams-calibrate" / "arrays"
    for chunk in (path for path in arrays.rglob("c/**/*") if path.is_file()):
        chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    recover(config, again="solve")
    warnings = (tmp_path / "run" / "events.jsonl").read_text()
    assert operators(tmp_path / "run") == operators(tmp_path / "calm")
    assert "The saved streams in" in warnings or not list(arrays.glob("*"))


def test_streams_that_do_not_fit_on_the_disk_are_refused_before_work(make_config, monkeypatch):
    usage = run_inputs.shutil.disk_usage

    def small(path):
        return usage(path)._replace(free=100_000)

    monkeypatch.setattr(run_inputs.shutil, "disk_usage", small)
    with pytest.raises(RunFolderError, match=r"saved streams 0.00|statistics"):
        recover(make_config(engine__kind="streaming"), again="calibrate")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine.tensor_parallel": 2}, "kind=streaming runs whole layers on one device"),
        ({"evaluation.tasks": ["boolq"]}, "evaluation.tasks runs the whole model again and again"),
        ({"refine.steps": 10}, "refine.steps=10 runs the whole model"),
    ],
)
def test_what_needs_the_whole_model_is_refused(fields, message):
    given = {
        "model.path": "m",
        "selection.remove": 2,
        "output.path": "r",
        "engine.kind": "streaming",
        **fields,
    }
    with pytest.raises(ConfigError, match=message):
        load_config(None, given)


def test_a_range_advances_layer_by_layer(make_config):
    """A layer may take minutes to read, and a replica that does not advance counts as hung."""

    class Sink:
        boundaries, mlp_layers = (0, 4), ()

        def __call__(self, *_):
            pass

        def result(self):
            return {}

    collectors = SimpleNamespace(collector=lambda *_: Sink())
    inputs = run_inputs.open_inputs(make_config(engine__kind="streaming"), Reporter())
    engine = open_offloaded_engine(inputs, 4)
    tokens = torch.arange(3 * 10, dtype=torch.int32).reshape(3, 10).numpy()
    told = []
    try:
        sums_of_range(engine, tokens, (0, 2), collectors, told.append)
    finally:
        engine.model.close()
    assert [count for count in told if count] == [5, 5, 5, 5]
