"""What a run does with a model that is read layer by layer: statistics, choices, evaluation.

The same stages as with a resident model, each in one pass over the files.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor

from ghost_dist.calibration.windows import Tokens, TokenWindows
from ghost_dist.checkpoint.peers import ALONE, Peers
from ghost_dist.checkpoint.reader import Checkpoint, open_checkpoint
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.devices import free_bytes
from ghost_dist.durable import fingerprint
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.engines.memory import Residency
from ghost_dist.engines.offloaded import OffloadedModel
from ghost_dist.engines.offloaded_rows import OffloadedEngine, prove_offloaded
from ghost_dist.errors import CorruptStoreError
from ghost_dist.evaluation.scores import last_logits
from ghost_dist.export.verify import has_our_code
from ghost_dist.pipeline.collecting import Collect, CollectHere
from ghost_dist.pipeline.collectors import Collectors, kept_numbers, wanted
from ghost_dist.pipeline.inputs import RunInputs, check_disk_space, open_causal_lm
from ghost_dist.progress import Advance, Reporter
from ghost_dist.statistics.at_hand import StoreAtHand
from ghost_dist.statistics.stream_state import StreamState
from ghost_dist.statistics.sums import WHOLE

_SHARE_OF_MEMORY_TO_CACHE = 0.5


class CollectOffloaded(Collect):
    """Fills stores from one sweep over the layers; the ``Collect`` of ``engine.kind=streaming``.

    Streams are saved below ``folder``, RUN, while a stage runs.
    """

    def __init__(self, inputs: RunInputs, reporter: Reporter, folder: Path) -> None:
        self._inputs, self._reporter, self._folder = inputs, reporter, folder

    def __call__(
        self,
        store: StoreAtHand,
        tokens: TokenWindows,
        collectors: Collectors,
        stage: str,
        *,
        to_fit: bool = False,
    ) -> None:
        folder, missing = self._folder / f"streams-{stage}", store.missing()
        if not missing:
            shutil.rmtree(folder, ignore_errors=True)  # a kill may have come before this
            return
        inputs, ranges = self._inputs, store.plan.ranges
        windows = [window for range_id in missing for window in ranges[range_id]]
        boundaries, mlp_layers = wanted(collectors)
        identity = {"plan": store.plan_fingerprint, "boundaries": boundaries, "mlp": mlp_layers}
        state = StreamState(folder, fingerprint(identity), sorted(windows))
        column = len(state.windows) * tokens.window_length * inputs.dtype.itemsize
        kept = kept_numbers(inputs.architecture, collectors)
        needs = {
            "saved streams": 2 * column * inputs.architecture.hidden_size,
            "kept streams": column * kept,
        }
        check_disk_space(self._folder, needs)
        engine = open_offloaded_engine(inputs, collectors.last_boundary, 1 + len(boundaries))
        try:
            total = len(state.windows) * tokens.window_length
            with self._reporter.stage(stage, total, "tokens") as advance:
                sweep = partial(engine.sweep, tokens.tokens, state.windows, boundaries, mlp_layers)
                try:
                    rows = sweep(advance, state)
                except CorruptStoreError as error:
                    self._reporter.warn(f"{error} The stage begins again.")
                    state.remove()
                    state = StreamState(state.folder, fingerprint(identity), sorted(windows))
                    rows = sweep(advance, state)
            self._reporter.event("layers-read", stage=stage, bytes=engine.model.bytes_read)
            with self._reporter.stage(f"{stage}: sums", len(missing), "ranges") as advance:
                for range_id in missing:

                    def committed(range_id: int = range_id) -> None:
                        self._reporter.event("range-committed", stage=stage, range=range_id)
                        if range_id == missing[-1]:
                            state.remove()

                    collector = collectors.collector(engine.device, WHOLE)
                    rows.feed(ranges[range_id], collector, engine.device)
                    store.keep(range_id, collector.result(), committed)
                    advance(1)
        finally:
            engine.model.close()
            state.close()
        if not to_fit:
            store.flush()


def collect_here(inputs: RunInputs, reporter: Reporter, folder: Path) -> Collect:
    """Who fills the stores of a run in one process; ``folder`` is where streams may be saved."""
    if inputs.streaming:
        return CollectOffloaded(inputs, reporter, folder)
    return CollectHere(inputs, reporter)


def evaluation_shape(inputs: RunInputs) -> tuple[int, int]:
    """Windows of all corpora of a run, and their length."""
    shapes = [windows.tokens.shape for windows in inputs.evaluation.values()]
    return sum(count for count, _ in shapes), shapes[0][1]


def open_offloaded_engine(
    inputs: RunInputs,
    num_layers: int,
    kept: int = 1,
    *,
    windows: int | None = None,
    peers: Peers = ALONE,
    free: int | None = None,
) -> OffloadedEngine:
    """The run's engine over layers ``0 .. num_layers - 1``, proven right on a small model.

    It will keep so many streams of each token, of ``windows`` at a time (None: of all); ``free`` as
    ``OffloadedModel.hold`` takes it.
    """
    model = OffloadedModel(
        inputs.source,
        inputs.architecture,
        num_layers,
        inputs.dtype,
        inputs.device,
        keep_cached=fits_page_cache(inputs.source),
        compiled=inputs.compiled,
        peers=peers,
    )
    calibration, engine = inputs.config.calibration, OffloadedEngine(model, inputs.batch)
    held = model.hold(
        inputs.config.engine.experts,
        batch_tokens=inputs.batch * calibration.window_length,
        tokens=(windows or calibration.windows) * calibration.window_length,
        kept=kept,
        head=False,
        free=free,
    )
    engine.conformance = prove_offloaded(inputs.source.path, inputs.device, held.experts)
    return engine


@contextlib.contextmanager
def layers_of(
    inputs: RunInputs,
    shape: tuple[int, int],
    num_variants: int,
    *,
    batch: int | None = None,
) -> Iterator[LayerwiseModel]:
    """The run's whole model, for a sweep with variants over windows of that shape.

    ``batch``: None is the run's.
    """
    if not inputs.streaming:
        yield LayerwiseModel(open_causal_lm(inputs), inputs.architecture)
        return
    with OffloadedModel(
        inputs.source,
        inputs.architecture,
        num_layers=inputs.architecture.num_layers,
        dtype=inputs.dtype,
        device=inputs.device,
        keep_cached=fits_page_cache(inputs.source),
    ) as layers:
        held = _hold(layers, inputs, shape, num_variants, batch or inputs.batch)
        prove_offloaded(inputs.source.path, inputs.device, held.experts)
        yield layers


def logits_of_exported(inputs: RunInputs, folder: Path, tokens: Tokens, advance: Advance) -> Tensor:
    """Logits (W, T, V) of an exported folder that is read layer by layer.

    It is opened by its own configuration and modeling file, and its tensors are put in place by
    transformers. Unlike ``export.verify.reload`` this is not a fresh process with transformers
    alone, which would have to hold the model.
    """
    exported = open_checkpoint(folder)
    ours = has_our_code(folder)
    config = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=ours, local_files_only=True
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=ours)
    num_layers = len(model.get_submodule(inputs.architecture.layers))
    with OffloadedModel(
        exported,
        dataclasses.replace(inputs.architecture, num_layers=num_layers),
        num_layers=num_layers,
        dtype=inputs.dtype,
        device=inputs.device,
        model_class=type(model),
        config=config,
    ) as layers:
        _hold(layers, inputs, tokens.shape, 1, 1)
        return last_logits(layers, Variant(), tokens, advance)


def _hold(
    model: OffloadedModel, inputs: RunInputs, shape: tuple[int, int], num_variants: int, batch: int
) -> Residency:
    return model.hold(
        inputs.config.engine.experts,
        batch_tokens=batch * shape[1],
        tokens=num_variants * shape[0] * shape[1],
    )


def fits_page_cache(checkpoint: Checkpoint) -> bool:
    """Whether the page cache can hold the checkpoint, so that the next stage finds it there."""
    free = free_bytes(torch.device("cpu"))
    return checkpoint.nbytes < _SHARE_OF_MEMORY_TO_CACHE * free
