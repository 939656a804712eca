"""What a run does with a model that is streamed layer by layer: statistics, choices, evaluation.

The same stages as with a resident model, each in one pass over the files.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.checkpoint.reader import Checkpoint, open_checkpoint
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.devices import free_bytes
from ghost_dist.durable import fingerprint
from ghost_dist.engines.base import Tokens
from ghost_dist.engines.lanes import Lane, run_lanes
from ghost_dist.engines.layer_fit import Held
from ghost_dist.engines.streamed_model import StreamedModel
from ghost_dist.engines.streaming import Rows, StreamingEngine, prove_streamed
from ghost_dist.errors import CorruptStoreError
from ghost_dist.evaluation.agreement import WindowScores, batch_scores, window_scores
from ghost_dist.evaluation.divergence import add_divergences
from ghost_dist.evaluation.perplexity import logit_pieces
from ghost_dist.export.verify import check_same_logits, has_our_code
from ghost_dist.pipeline.collectors import Collectors, MakeCollector, passes_here
from ghost_dist.pipeline.inputs import RunInputs, check_disk_space
from ghost_dist.pipeline.timing import RangeTimes, Stopwatch
from ghost_dist.progress import Advance, Reporter
from ghost_dist.spans import Span
from ghost_dist.statistics.store import StatisticsStore
from ghost_dist.statistics.stream_state import StreamState
from ghost_dist.statistics.sums import WHOLE, Sums

_SHARE_OF_MEMORY_TO_CACHE = 0.5


class CollectByStreaming:
    """Fills stores from one sweep over the layers; the ``Collect`` of ``engine.kind=streaming``.

    Parameters
    ----------
    inputs, reporter
        Of the run.
    folder
        RUN: streams are saved below it while a stage runs.
    """

    def __init__(self, inputs: RunInputs, reporter: Reporter, folder: Path) -> None:
        self._inputs, self._reporter, self._folder = inputs, reporter, folder

    def __call__(
        self,
        store: StatisticsStore,
        tokens: TokenWindows,
        collectors: Collectors,
        stage: str,
        *,
        to_fit: bool = False,  # noqa: ARG002 - this process fits from the store
    ) -> None:
        """Run every range that is missing in the store, and commit it; see ``Collect``.

        Raises
        ------
        RunFolderError
            If the disk has no room for the streams.
        """
        folder, missing = self._folder / f"streams-{stage}", store.missing()
        if not missing:
            shutil.rmtree(folder, ignore_errors=True)  # a kill may have come before this
            return
        inputs, ranges = self._inputs, store.plan.ranges
        windows = [window for range_id in missing for window in ranges[range_id]]
        boundaries, mlp_layers = _wanted(collectors)
        identity = {"plan": store.plan_fingerprint, "boundaries": boundaries, "mlp": mlp_layers}
        state = StreamState(folder, fingerprint(identity), sorted(windows))
        self._check_disk(len(state.windows) * tokens.window_length, boundaries, mlp_layers)
        engine = open_streaming_engine(inputs, collectors.last_boundary, 1 + len(boundaries))
        try:
            with self._reporter.stage(stage, boundaries[-1], "layers") as advance:
                try:
                    rows = engine.sweep(
                        tokens.tokens, state.windows, boundaries, mlp_layers, advance, state
                    )
                except CorruptStoreError as error:
                    self._reporter.warn(f"{error} The stage begins again.")
                    state.remove()
                    state = StreamState(state.folder, fingerprint(identity), sorted(windows))
                    rows = engine.sweep(
                        tokens.tokens, state.windows, boundaries, mlp_layers, advance, state
                    )
            self._reporter.event("layers-read", stage=stage, bytes=engine.model.bytes_read)
            passes = passes_here(collectors, engine)
            with self._reporter.stage(f"{stage}: sums", len(missing), "ranges") as advance:
                for range_id in missing:
                    sums = _sums_of_rows(rows, ranges[range_id], passes, engine.device)
                    store.commit(range_id, sums)
                    self._reporter.event("range-committed", stage=stage, range=range_id)
                    advance(1)
        finally:
            engine.close()
            state.close()
        state.remove()

    def release(self) -> None:
        """Nothing is kept between stages."""

    def _check_disk(
        self, num_tokens: int, boundaries: Sequence[int], mlp_layers: Sequence[int]
    ) -> None:
        architecture, itemsize = self._inputs.architecture, self._inputs.dtype.itemsize
        stream = num_tokens * architecture.hidden_size * itemsize
        inner = sum(architecture.inner_sizes[layer] for layer in mlp_layers)
        kept = stream * (len(boundaries) + len(mlp_layers)) + num_tokens * inner * itemsize
        check_disk_space(self._folder, {"saved streams": 2 * stream, "kept streams": kept})


def streamed_range(
    engine: StreamingEngine,
    tokens: Tokens,
    windows: Sequence[int],
    collectors: Collectors,
    make_passes: Callable[[Collectors], Sequence[MakeCollector]],
    advance: Advance,
) -> tuple[dict[str, Sums], RangeTimes]:
    """As ``collectors.sums_of_range``, each layer read once for all passes.

    ``make_passes`` is asked once the rows are where they stay, for what memory they leave.
    ``advance`` is called with tokens at every layer, since a layer may take minutes to read.
    """
    boundaries, mlp_layers = _wanted(collectors)
    total, done, told = len(windows) * tokens.shape[1], 0, 0

    def after(layers: int) -> None:
        nonlocal done, told
        done += layers
        advance(total * done // boundaries[-1] - told)
        told = total * done // boundaries[-1]

    watch = Stopwatch(engine.device)
    began = watch.now()
    rows = engine.sweep(tokens, windows, boundaries, mlp_layers, after)
    with watch.lap():
        sums = _sums_of_rows(rows, windows, make_passes(collectors), engine.device)
    total_s = watch.until_now(began)
    sums_s = watch.seconds()
    return sums, RangeTimes(forward_s=total_s - sums_s, sums_s=sums_s)


def _sums_of_rows(
    rows: Rows, windows: Sequence[int], passes: Sequence[MakeCollector], device: torch.device
) -> dict[str, Sums]:
    sums: dict[str, Sums] = {}
    for make in passes:
        collector = make()
        rows.feed(windows, collector, device)
        sums |= collector.result()
    return sums


def open_streaming_engine(inputs: RunInputs, num_layers: int, kept: int = 1) -> StreamingEngine:
    """The run's engine over layers ``0 .. num_layers - 1``, proven right on a small model.

    It will keep so many streams of each token.
    """
    engine = StreamingEngine(
        inputs.source,
        inputs.architecture,
        num_layers=num_layers,
        dtype=inputs.dtype,
        device=inputs.device,
        batch=inputs.batch,
        keep_cached=fits_page_cache(inputs.source),
        compiled=inputs.compiled,
    )
    calibration = inputs.config.calibration
    held = engine.model.hold(
        inputs.config.engine.experts,
        batch_tokens=inputs.batch * calibration.window_length,
        tokens=calibration.windows * calibration.window_length,
        kept=kept,
    )
    prove_streamed(inputs.source.path, inputs.device, held.experts)
    return engine


def streamed_divergences(
    inputs: RunInputs,
    spans: Sequence[Span],
    candidates: Sequence[Mapping[Span, Repair]],
    tokens: Tokens,
    advance: Advance,
) -> Tensor:
    """As ``evaluation.divergence.window_divergences``, each layer read once for all candidates.

    ``advance`` is called with layers.
    """
    sums = torch.zeros((len(candidates), len(tokens)), dtype=torch.float64, device=inputs.device)
    lanes = [Lane(), *(Lane(tuple(spans), candidate) for candidate in candidates)]
    with _streamed_model(inputs, tokens, len(lanes), inputs.batch) as model:
        head = _Head(model, inputs.architecture.vocab_size)

        def compare(part: slice, streams: list[Tensor]) -> None:
            ids_BT = torch.from_numpy(tokens[part].astype(np.int64)).to(inputs.device)
            flat = [stream.flatten(0, 1) for stream in streams]
            add_divergences(head, flat[0], flat[1:], ids_BT, sums[:, part])

        run_lanes(
            model,
            inputs.architecture,
            lanes,
            tokens,
            batch=inputs.batch,
            at_end=compare,
            advance=advance,
        )
    per_token: Tensor = sums / tokens.shape[1]
    return per_token


def streamed_scores(
    inputs: RunInputs,
    lanes: Sequence[Lane],
    corpora: Mapping[str, TokenWindows],
    advance: Advance,
) -> dict[str, list[WindowScores]]:
    """Scores of every lane on every corpus, each layer read once for all of them.

    Parameters
    ----------
    inputs
        Of the run.
    lanes
        The dense model first.
    corpora
        By name; windows of one length.
    advance
        Called with layers.

    Raises
    ------
    NonFiniteLossError
        If the loss of a window is NaN or Inf.
    """
    tokens = np.concatenate([windows.tokens for windows in corpora.values()])
    sums = np.zeros((3, len(lanes), len(tokens)))
    with _streamed_model(inputs, tokens, len(lanes), inputs.batch) as model:
        head = _Head(model, inputs.architecture.vocab_size)

        def score(part: slice, streams: list[Tensor]) -> None:
            ids_BT = torch.from_numpy(tokens[part].astype(np.int64)).to(inputs.device)
            flat = [stream_BTC.flatten(0, 1) for stream_BTC in streams]
            sums[:, :, part] = batch_scores(head, flat, ids_BT)

        run_lanes(
            model,
            inputs.architecture,
            lanes,
            tokens,
            batch=inputs.batch,
            at_end=score,
            advance=advance,
        )
    found, first = {}, 0
    for corpus, windows in corpora.items():
        part = slice(first, first + windows.num_windows)
        found[corpus] = window_scores(sums[:, :, part], windows)
        first = part.stop
    return found


def streamed_verify(
    inputs: RunInputs, folder: Path, recovered: Lane, tokens: Tokens, advance: Advance
) -> float:
    """Compare logits of an exported folder with the recovered model's, both streamed.

    The folder is opened by its own configuration and modeling file, and its tensors are put in
    place by transformers. Unlike ``export.verify.verify_reload`` this is not a fresh process with
    transformers alone, which would have to hold the model.

    Returns
    -------
    float
        Largest absolute difference of a logit.

    Raises
    ------
    ExportError
        If the logits differ by more than rounding.
    """
    with _streamed_model(inputs, tokens, 1, 1) as model:
        expected = _logits(model, inputs, recovered, tokens, advance)
    exported = open_checkpoint(folder)
    ours = has_our_code(folder)
    config = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=ours, local_files_only=True
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=ours)
    model_class = type(model)
    kept = inputs.architecture.num_layers - len(recovered.removed)
    with StreamedModel(
        exported,
        dataclasses.replace(inputs.architecture, num_layers=kept),
        num_layers=kept,
        dtype=inputs.dtype,
        device=inputs.device,
        model_class=model_class,
        config=config,
    ) as model:
        _hold(model, inputs, tokens, 1, 1)
        found = _logits(model, inputs, Lane(), tokens, advance)
    return check_same_logits(folder, found, expected, kept, inputs.dtype)


def _logits(
    model: StreamedModel, inputs: RunInputs, lane: Lane, tokens: Tokens, advance: Advance
) -> Tensor:
    """Logits (W, T, V) of one lane, float32 on the CPU."""
    found: list[Tensor] = []

    def keep(_: slice, streams: list[Tensor]) -> None:
        for stream_TC in streams[0]:
            found.append(model.logits(stream_TC).float().cpu())

    run_lanes(model, inputs.architecture, [lane], tokens, batch=1, at_end=keep, advance=advance)
    return torch.stack(found)


class _Head:
    """Logits of streams, for functions that work on what a body computed; a ``Head``."""

    def __init__(self, model: StreamedModel, vocab_size: int) -> None:
        self._model, self._vocab_size = model, vocab_size

    def pieces(self, ids_BT: Tensor) -> Iterator[slice]:
        """Slices of positions, small enough for their logits."""
        yield from logit_pieces(ids_BT.numel(), self._vocab_size)

    def logits(self, body: Any, ids_BT: Tensor, piece: slice) -> Tensor:  # noqa: ARG002 - as Head
        """Logits (n, V) of some of the streams (B T, C)."""
        return self._model.logits(body[piece])


def _streamed_model(inputs: RunInputs, tokens: Tokens, num_lanes: int, batch: int) -> StreamedModel:
    """The run's whole model, for lanes over some windows; proven right on a small model."""
    model = StreamedModel(
        inputs.source,
        inputs.architecture,
        num_layers=inputs.architecture.num_layers,
        dtype=inputs.dtype,
        device=inputs.device,
        keep_cached=fits_page_cache(inputs.source),
    )
    held = _hold(model, inputs, tokens, num_lanes, batch)
    prove_streamed(inputs.source.path, inputs.device, held.experts)
    return model


def _hold(
    model: StreamedModel, inputs: RunInputs, tokens: Tokens, num_lanes: int, batch: int
) -> Held:
    return model.hold(
        inputs.config.engine.experts,
        batch_tokens=batch * tokens.shape[1],
        tokens=num_lanes * tokens.size,
    )


def fits_page_cache(checkpoint: Checkpoint) -> bool:
    """Whether the page cache can hold the checkpoint, so that the next stage finds it there."""
    free = free_bytes(torch.device("cpu"))
    return checkpoint.nbytes < _SHARE_OF_MEMORY_TO_CACHE * free


def _wanted(collectors: Collectors) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Boundaries and MLP layers that any pass wants; collectors without storage say so."""
    sinks = [make() for make in collectors.passes(torch.device("meta"), 1 << 62, WHOLE)]
    boundaries = sorted({b for sink in sinks for b in sink.boundaries})
    mlp_layers = sorted({layer for sink in sinks for layer in sink.mlp_layers})
    return tuple(boundaries), tuple(mlp_layers)
