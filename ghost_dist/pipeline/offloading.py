"""The run's model for a sweep: in memory, or read layer by layer, in one pass over the files."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor

from ghost_dist.calibration.windows import Tokens
from ghost_dist.checkpoint.peers import ALONE, Peers
from ghost_dist.checkpoint.reader import Checkpoint, open_checkpoint
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.devices import free_bytes
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.engines.memory import Residency
from ghost_dist.engines.offloaded import OffloadedModel
from ghost_dist.engines.offloaded_rows import OffloadedEngine, prove_offloaded
from ghost_dist.evaluation.scores import last_logits
from ghost_dist.export.verify import has_our_code
from ghost_dist.pipeline.inputs import RunInputs, open_causal_lm
from ghost_dist.progress import Advance

_SHARE_OF_MEMORY_TO_CACHE = 0.5


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
