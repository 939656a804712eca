"""Layer streaming against the model as a whole: streams, variants, what is read, what survives."""

import contextlib
import errno
import itertools
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from disk_steps import Killed
from families import CUTS, FAMILIES, NUM_LAYERS, VOCAB, save_checkpoint
from recording import Recorder, saved_at_once
from safetensors.torch import load_file, save_file

from ghost_dist.checkpoint.architecture import inspect_architecture
from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.surgery import insert_operators, remove_layers
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.checkpoint.weight_reader import WeightReader
from ghost_dist.engines.offloaded import OffloadedModel
from ghost_dist.engines.offloaded_rows import OffloadedEngine, prove_offloaded
from ghost_dist.engines.resident import ResidentEngine, load_decoder
from ghost_dist.engines.sweep import AtEnd
from ghost_dist.engines.sweep import sweep as sweep_variants
from ghost_dist.errors import CheckpointError, CorruptStoreError, NonFiniteActivationError
from ghost_dist.statistics import stream_state
from ghost_dist.statistics.stream_state import StreamState

CPU = torch.device("cpu")
WINDOWS, LENGTH = 5, 20
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (WINDOWS, LENGTH), dtype=np.int32)
ORDER = [3, 0, 4, 1]


def open_engine(source, architecture, num_layers=NUM_LAYERS, batch=2):
    prove_offloaded(source.path, CPU)
    return OffloadedEngine(
        OffloadedModel(
            source, architecture, num_layers=num_layers, dtype=torch.float32, device=CPU
        ),
        batch,
    )


def resident(source, architecture, num_layers=NUM_LAYERS, batch=2):
    decoder = load_decoder(
        source.path, architecture, num_layers=num_layers, dtype=torch.float32, device=CPU
    )
    return ResidentEngine(decoder, batch)


def with_weights(model):
    """Decoder layers that hold numbers, the embeddings' table included as -1."""
    found = [
        number
        for number, layer in enumerate(model.layers)
        if any(parameter.device.type != "meta" for parameter in layer.parameters())
    ]
    return found + [-1] * (model._embeddings.weight.device.type != "meta")


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_and_mlp_rows_are_bitwise_those_of_the_whole_model(checkpoint, family):
    source, architecture = checkpoint(family)
    mlp = tuple(sorted(architecture.down_projections))[:2]
    recorders = []
    for open_with in (resident, open_engine):
        recorder = Recorder((0, 2, 3, NUM_LAYERS), mlp)
        open_with(source, architecture).run(TOKENS, ORDER, recorder, lambda _: None)
        recorders.append(recorder)
    expected, got = recorders
    assert got.streams.keys() == expected.streams.keys()
    assert got.mlp.keys() == expected.mlp.keys()
    for key, stream in expected.streams.items():
        assert torch.equal(got.streams[key], stream), key
    for key, parts in expected.mlp.items():
        assert all(map(torch.equal, got.mlp[key], parts)), key
    assert [window for b, window in got.order if b == 0] == ORDER


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3", "deepseek_v3"])
def test_every_needed_tensor_is_read_once_and_one_layer_has_weights(
    checkpoint, family, monkeypatch
):
    source, architecture = checkpoint(family)
    engine = open_engine(source, architecture, num_layers=4)
    held, running = [], engine.model.running

    def watched(layer, *arguments, **options):
        held.append(with_weights(engine.model))
        return running(layer, *arguments, **options)

    monkeypatch.setattr(engine.model, "running", watched)
    engine.run(TOKENS, range(WINDOWS), Recorder((1, 4)), lambda _: None)
    assert held == [[0], [1], [2], [3]]
    assert with_weights(engine.model) == []
    needed = sum(
        tensor.nbytes
        for name, tensor in source.tensors.items()
        if any(f"layers.{layer}." in name for layer in range(4)) or "embed_tokens" in name
    )
    assert engine.model.bytes_read == needed


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "mixtral", "gpt2", "opt", "olmo2"])
@pytest.mark.parametrize("cut", CUTS)
def test_variants_give_the_logits_of_the_model_that_is_really_cut(checkpoint, loaded, family, cut):
    """All variants at once, in one pass over the files, against one model in memory for each."""
    source, architecture = checkpoint(family)
    spans = CUTS[cut]
    generator = torch.Generator().manual_seed(1)
    width = architecture.hidden_size

    def repair():
        noise = torch.randn(width, width, generator=generator, dtype=torch.float64)
        return Repair(torch.eye(width, dtype=torch.float64) + 0.1 * noise)

    operators = {span: repair() for span in spans}
    joint = dict(operators)
    for span in spans:
        if (inner := architecture.inner_sizes.get(span.start - 1)) is not None:
            down_FC = torch.randn(inner, width, generator=generator, dtype=torch.float64)
            joint[span] = replace(operators[span], down_FC=down_FC)
    variants = [Variant(), Variant(spans), Variant(spans, operators), Variant(spans, joint)]
    found = [[] for _ in variants]
    prove_offloaded(source.path, CPU)
    with OffloadedModel(
        source, architecture, num_layers=NUM_LAYERS, dtype=torch.float32, device=CPU
    ) as model:

        def keep(part, streams):
            assert part.stop - part.start <= 2
            for of_variant, stream_BTC in zip(found, streams, strict=True):
                of_variant += [model.logits(stream_TC) for stream_TC in stream_BTC]

        sweep_variants(model, variants, TOKENS, [AtEnd(keep)], batch=2)
        tied = model._tied
        table = sum(t.nbytes for n, t in source.tensors.items() if "embed_tokens.weight" in n)
        table += sum(t.nbytes for n, t in source.tensors.items() if "wte.weight" in n)
        assert model.bytes_read == source.nbytes + tied * table
    ids = torch.from_numpy(TOKENS).long()
    for variant, logits in zip(variants, found, strict=True):
        whole, _ = loaded(family)
        if variant.spans:
            remove_layers(whole, architecture, variant.spans)
        insert_operators(whole, architecture, variant)
        with torch.inference_mode():
            expected = torch.cat([whole(row[None], use_cache=False).logits for row in ids])
        torch.testing.assert_close(torch.stack(logits), expected, rtol=0, atol=2e-5)


def sweep(source, architecture, state, die_after=None):
    engine = open_engine(source, architecture)
    tokens = []

    def advance(count):
        tokens.append(count)
        saved_at_once(state)
        if die_after is not None and sum(tokens) == die_after * len(ORDER) * LENGTH // 5:
            raise Killed

    with engine.model:
        windows = ORDER if state is None else state.windows
        rows = engine.sweep(TOKENS, windows, (2, 5), (1,), advance, state)
    return rows, engine.model.bytes_read


@pytest.mark.parametrize("die_after", [1, 2, 3, 4])
def test_a_sweep_goes_on_at_the_layer_where_it_was_stopped(checkpoint, tmp_path, die_after):
    source, architecture = checkpoint("llama")
    expected, all_bytes = sweep(source, architecture, None)
    state = StreamState(tmp_path / "state", "same", sorted(ORDER))
    with pytest.raises(Killed):
        sweep(source, architecture, state, die_after)
    state.close()
    state = StreamState(tmp_path / "state", "same", [0, 1])  # some ranges are committed by now
    assert state.windows == tuple(sorted(ORDER))
    assert state.load().boundary == die_after
    engine = open_engine(source, architecture)
    rows = engine.sweep(TOKENS, state.windows, (2, 5), (1,), lambda _: None, state)
    layer = sum(t.nbytes for n, t in source.tensors.items() if ".layers.0." in n)
    assert all_bytes - engine.model.bytes_read == die_after * layer
    assert rows.tensors.keys() == expected.tensors.keys()
    for name, tensor in rows.tensors.items():
        for window in ORDER:
            got = tensor[rows.windows.index(window)]
            assert torch.equal(got, expected.tensors[name][expected.windows.index(window)]), name
    state.remove()
    assert not state.folder.exists()


def test_a_state_of_other_inputs_or_fewer_windows_is_not_used(checkpoint, tmp_path):
    source, architecture = checkpoint("llama")
    for fingerprint, windows in (("other", ORDER), ("same", range(WINDOWS))):
        state = StreamState(tmp_path / "state", "same", ORDER)
        sweep(source, architecture, state)
        state.close()
        assert StreamState(tmp_path / "state", fingerprint, windows).load() is None


@pytest.mark.parametrize("what", ["a flipped bit", "a lost chunk", "a lost array"])
def test_damage_of_a_state_is_found(checkpoint, tmp_path, what):
    source, architecture = checkpoint("llama")
    state = StreamState(tmp_path / "state", "same", ORDER)
    with pytest.raises(Killed):
        sweep(source, architecture, state, 3)
    state.close()
    state = StreamState(tmp_path / "state", "same", ORDER)
    chunk = next(p for p in sorted((state.folder / "arrays").rglob("c/*/*/*")) if p.is_file())
    if what == "a flipped bit":
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 1
        chunk.write_bytes(content)
    elif what == "a lost chunk":
        chunk.unlink()
    else:
        shutil.rmtree(next((state.folder / "arrays").iterdir()))
    with pytest.raises(CorruptStoreError, match="The saved streams in .*state"):
        state.load()


def test_saving_takes_a_tenth_of_the_time_and_loses_no_row(tmp_path, monkeypatch):
    go_on, write = threading.Event(), stream_state.write_array

    def slow(path, values):
        go_on.wait(30)
        return write(path, values)

    monkeypatch.setattr(stream_state, "write_array", slow)
    state = StreamState(tmp_path / "state", "same", [0, 1])
    streams = torch.arange(12.0).view(2, 2, 3)
    assert state.save(1, streams.clone)
    assert not state.save(2, streams.clone)
    state.keep("boundary 3", streams * 3, None)
    assert not state.save(3, "boundary 3")
    time.sleep(0.1)
    go_on.set()
    state.wait()
    assert state._rested > time.monotonic() + 0.8
    assert not state.save(4, streams.clone)
    saved = StreamState(tmp_path / "state", "same", [0]).load()
    assert (saved.boundary, saved.rows) == (1, {})
    state._rested = 0.0
    state.keep("boundary 5", streams * 5, None)
    assert state.save(5, "boundary 5")
    state.wait()
    saved = StreamState(tmp_path / "state", "same", [0]).load()
    assert saved.boundary == 5
    assert torch.equal(saved.streams_WTC, streams * 5)
    assert torch.equal(saved.rows["boundary 3"], streams * 3)
    assert torch.equal(saved.rows["boundary 5"], streams * 5)
    assert saved.streams_WTC.data_ptr() != saved.rows["boundary 5"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_states_keep_every_dtype_bit_by_bit(tmp_path, dtype):
    tensor = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[0, 0, 0] = -0.0
    state = StreamState(tmp_path / "state", "same", range(5))
    state.keep("row", tensor, None)
    state.save(2, tensor.clone)
    state.wait()
    saved = state.load()
    for got in (saved.streams_WTC, saved.rows["row"]):
        assert got.dtype == dtype
        assert torch.equal(got.view(torch.int8), tensor.view(torch.int8))


def test_a_full_disk_stops_the_sweep(checkpoint, tmp_path, monkeypatch):
    source, architecture = checkpoint("llama")
    calls = itertools.count()

    def full(path, values):
        if next(calls) >= 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, values)

    write = stream_state.write_array
    monkeypatch.setattr(stream_state, "write_array", full)
    state = StreamState(tmp_path / "state", "same", ORDER)
    with pytest.raises(OSError, match="No space left"):
        sweep(source, architecture, state)
    monkeypatch.setattr(stream_state, "write_array", write)
    state.close()
    state = StreamState(tmp_path / "state", "same", ORDER)
    rows, _ = sweep(source, architecture, state)
    expected, _ = sweep(source, architecture, None)
    assert all(torch.equal(rows.tensors[n], t) for n, t in expected.tensors.items())


@pytest.fixture
def own_copy(tmp_path):
    source = open_checkpoint(save_checkpoint("llama", tmp_path / "model"))
    return source, inspect_architecture(source)


def shard_of(source, layer):
    info = next(t for n, t in source.tensors.items() if f"layers.{layer}.mlp.up_proj" in n)
    return source.path / info.file, info.name


def test_nan_in_a_weight_is_named(own_copy):
    source, architecture = own_copy
    path, name = shard_of(source, 3)
    tensors = load_file(path)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    source = open_checkpoint(source.path)
    with pytest.raises(CheckpointError, match=r"up_proj.weight holds NaN or Inf"):
        open_engine(source, architecture).run(TOKENS, [0], Recorder((5,)), lambda _: None)


def test_streams_that_overflow_are_named(own_copy):
    source, architecture = own_copy
    path, name = shard_of(source, 3)
    tensors = load_file(path)
    tensors[name] *= 1e38
    save_file(tensors, path, metadata={"format": "pt"})
    source = open_checkpoint(source.path)
    with pytest.raises(NonFiniteActivationError) as caught:
        open_engine(source, architecture).run(TOKENS, ORDER, Recorder((5,)), lambda _: None)
    assert (caught.value.boundary, caught.value.window) == (4, 0)


@pytest.mark.parametrize("what", ["removed", "replaced", "truncated"])
def test_a_shard_that_changes_during_the_run_is_named(own_copy, what):
    source, architecture = own_copy
    path, _ = shard_of(source, 4)
    engine = open_engine(source, architecture)

    layers = itertools.count()

    def advance(_):
        if next(layers) != 0:
            return
        if what == "removed":
            path.unlink()
        elif what == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        else:
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)

    expected = {
        "removed": r"cannot be read any more",
        "replaced": r"has changed since the run began: \d+ bytes",
        "truncated": r"has changed since the run began: \d+ bytes",
    }[what]
    with pytest.raises(CheckpointError, match=expected) as caught:
        engine.sweep(TOKENS, ORDER, (6,), (), advance)
    assert path.name in str(caught.value)


def test_a_file_that_ends_early_is_named(own_copy):
    source, _ = own_copy
    path, name = shard_of(source, 2)
    with contextlib.closing(WeightReader(source, CPU)) as reader:
        path.write_bytes(path.read_bytes()[:64])
        reader._states[path.name] = reader._state(path.name)  # as if nobody had looked
        with pytest.raises(CheckpointError, match=r"it ends at byte"):
            reader.start([name]).wait()


def test_bfloat16_weights_are_computed_in_float32_as_the_whole_model_does(tmp_path):
    source = open_checkpoint(save_checkpoint("llama", tmp_path / "model", torch.bfloat16))
    architecture = inspect_architecture(source)
    found = []
    for open_with in (resident, open_engine):
        recorder = Recorder((0, 6))
        open_with(source, architecture).run(TOKENS, ORDER, recorder, lambda _: None)
        found.append(recorder.streams)
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert found[1][6, 0].dtype == torch.float32


def test_a_model_is_left_usable_after_an_error_inside_a_layer(checkpoint):
    source, architecture = checkpoint("llama")
    prove_offloaded(source.path, CPU)
    model = OffloadedModel(
        source, architecture, num_layers=NUM_LAYERS, dtype=torch.float32, device=CPU
    )
    with contextlib.suppress(Killed), model.through([0, 1]) as groups:
        assert next(groups) == 0
        raise Killed
    assert with_weights(model) == []
    ids = torch.from_numpy(TOKENS[:1]).long()
    whole = load_causal_lm(source.path, dtype=torch.float32, device=CPU)
    with model.through(["embeddings", *range(NUM_LAYERS), "head"]) as groups:
        for group in groups:
            if group == "embeddings":
                stream = model.embed(ids)
            elif group == "head":
                logits = model.logits(stream[0])
            else:
                with model.running(group) as run:
                    stream = run(stream)
    with torch.inference_mode():
        assert torch.equal(logits, whole(ids, use_cache=False).logits[0])
