"""The recovered checkpoint: written under another name, proven, and renamed."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghost_dist.calibration.windows import load_windows
from ghost_dist.checkpoint.surgery import insert_operators, remove_layers
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.devices import release_cached
from ghost_dist.durable import fsync_folder, fsync_in, fsync_tree
from ghost_dist.errors import GhostDistError
from ghost_dist.evaluation.scores import last_logits
from ghost_dist.export.model_card import CARD, model_card
from ghost_dist.export.reload_script import generate
from ghost_dist.export.rewrite import Copied, export_checkpoint, not_written
from ghost_dist.export.verify import (
    FreshProcess,
    check_same_logits,
    fresh_process,
    verify_reload,
    verify_tokenizer,
)
from ghost_dist.pipeline.cost import Cost
from ghost_dist.pipeline.inputs import RunInputs, keeps_model, open_causal_lm
from ghost_dist.pipeline.offloading import layers_of, logits_of_exported
from ghost_dist.pipeline.run_shape import RunShape
from ghost_dist.progress import Reporter
from ghost_dist.run_folder import RunFolder
from ghost_dist.solver.operators import operator_of

RESULT = "result.json"
_VERIFIED = (2, 256)  # windows, and tokens of each


class _Stopped(Exception):  # noqa: N818 - no error: nobody wants it any more
    """Ends a copy."""


class Export:
    """Writes the recovered checkpoint; a context.

    ``ahead``: it begins before the operators are known. The process that will check it takes
    seconds to start, and most of its bytes depend on nothing but what is cut.
    """

    def __init__(
        self, inputs: RunInputs, run: RunFolder, reporter: Reporter, *, ahead: bool
    ) -> None:
        self._inputs, self._run, self._reporter = inputs, run, reporter
        self._ahead, self._folder = ahead, run.path / "checkpoint.ahead"
        self._stack, self._ended = ExitStack(), threading.Event()
        self._copying: Future[Copied] | None = None
        self._syncing: list[Future[None]] = []
        self._stop: BaseException | None = None

    def __enter__(self) -> Export:
        shutil.rmtree(self._folder, ignore_errors=True)  # of a killed run
        if self._ahead:
            _ = self.process
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._stack.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @cached_property
    def process(self) -> FreshProcess:
        """The one that checks the checkpoint."""
        device = None if self._inputs.streaming else self._inputs.device
        return self._stack.enter_context(fresh_process(device))

    def copy(self, cut: Variant) -> None:
        """Begin to copy the weights that stay, in a thread; not from a disk that others read."""
        inputs = self._inputs
        elsewhere = inputs.streaming or inputs.config.on_cluster
        if elsewhere or not self._ahead or self._copying is not None:
            return

        def check(_: int) -> None:
            if self._ended.is_set():
                raise _Stopped

        def work() -> Copied:
            most = inputs.config.export.max_shard_bytes
            plan = Copied.plan(inputs.source, inputs.architecture, cut, self._folder, most)
            for path in plan.write(check):  # a disk is slower than the page cache
                self._syncing.append(fsync_in(disk, path))
            return plan

        disk = self._stack.enter_context(ThreadPoolExecutor(1))
        self._copying = self._stack.enter_context(ThreadPoolExecutor(1)).submit(work)

    def write(self, recovered: Variant, beside: Callable[[], Any] | None) -> dict[str, Any]:
        """Write the checkpoint; a fresh process reloads it before it gets its name.

        ``beside`` is done meanwhile where there is room for both, and where it fails somebody does
        it again. A stop in it waits for :meth:`end` if that process has ended by then.
        """
        inputs, run = self._inputs, self._run
        _ = self.process  # starts while files are written
        unverified, replaced = run.path / "checkpoint.unverified", run.path / "checkpoint.replaced"
        shutil.rmtree(unverified, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        try:
            nbytes = inputs.source.bytes_once_read
            with self._reporter.stage("export", nbytes, "bytes") as advance:
                export_checkpoint(
                    inputs.source,
                    inputs.architecture,
                    recovered,
                    unverified,
                    tokenizer=inputs.tokenizer,
                    max_shard_bytes=inputs.config.export.max_shard_bytes,
                    extra_files={
                        "config.yaml": run.path / "config.yaml",
                        CARD: model_card(inputs.source, inputs.config, recovered).encode(),
                    },
                    advance=advance,
                    copied=self._copied(),
                )
            with ThreadPoolExecutor(1) as thread:
                synced = thread.submit(self._sync, unverified)
                difference = self._verify(unverified, recovered, beside)
                try:
                    synced.result()
                except OSError as error:
                    raise not_written(unverified, error) from error
            # An older checkpoint loses its name before it is removed: a kill in the middle of the
            # removal must not leave half of it under the name of a whole one.
            if run.checkpoint.exists():
                run.checkpoint.rename(replaced)
            unverified.rename(run.checkpoint)
            fsync_folder(run.path)
        finally:
            shutil.rmtree(unverified, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)
        return {"reload_max_abs_difference": difference, "files": file_sizes(run.checkpoint)}

    def end(self) -> None:
        if self._stop is not None:
            raise self._stop

    def _copied(self) -> Copied | None:
        """What was copied, once that is done; None if it could not be: the export will say why."""
        if self._copying is None:
            return None
        try:
            return self._copying.result()
        except (OSError, GhostDistError):
            shutil.rmtree(self._folder, ignore_errors=True)
            self._syncing.clear()
            return None

    def _sync(self, exported: Path) -> None:
        """Wait until the disk has what was copied, and all else of the export."""
        for file in self._syncing:
            file.result()
        fsync_tree(exported)

    def _verify(self, folder: Path, recovered: Variant, beside: Callable[[], Any] | None) -> float:
        """Compare the exported folder with the recovered model and the original's tokenizer."""
        inputs, reporter, fresh = self._inputs, self._reporter, self.process
        windows, length = _VERIFIED
        tokens = load_windows(self._run.tokens).tokens[:windows, :length]
        times = 1 + inputs.streaming  # that tokens are run in this process
        kept = inputs.architecture.num_layers - len(recovered.removed)
        with reporter.stage("verify", times * int(tokens.size), "tokens") as advance:
            with layers_of(inputs, tokens.shape, 1, batch=1) as layers:
                expected = last_logits(layers, recovered, tokens, advance)
            del layers  # a fresh process needs the memory
            gc.collect()
            release_cached(inputs.device)
            if inputs.streaming:
                found = logits_of_exported(inputs, folder, tokens, advance)
                verify_tokenizer(folder, inputs.tokenizer, fresh)
                return check_same_logits(folder, found, expected, kept, inputs.dtype)

        def generated(prompt: Tensor) -> Tensor:
            model = open_causal_lm(inputs, own=True)
            remove_layers(model, inputs.architecture, recovered.spans)
            insert_operators(model, inputs.architecture, recovered)
            new: Tensor = generate(model, prompt)[1][0]
            return new

        with ExitStack() as waiting:

            def meanwhile() -> None:
                if beside is not None and keeps_model(inputs):
                    try:
                        beside()
                    except (GhostDistError, torch.OutOfMemoryError):
                        pass
                    except Exception:
                        raise
                    except BaseException as stop:
                        if fresh.process.poll() is None:
                            raise
                        self._stop = stop
                waiting.enter_context(reporter.waiting("verify"))

            return verify_reload(
                folder,
                expected,
                tokens,
                num_layers=kept,
                generate=generated,
                tokenizer=inputs.tokenizer,
                dtype=inputs.dtype,
                device=inputs.device,
                fresh=fresh,
                meanwhile=meanwhile,
            )


def file_sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of the files of a checkpoint, but for those that are written anew at the end."""
    files = [path for path in checkpoint.glob("*") if path.name not in (CARD, RESULT)]
    return {path.name: path.stat().st_size for path in files}


def export_cost(run: RunShape) -> Cost:
    """Of :meth:`Export.write`: logits of the recovered model, here and in a fresh process."""
    inputs, sizes = run.inputs, run.sizes
    width, operator = sizes.hidden_size, operator_of(inputs.config.operator.name)
    windows, length = _VERIFIED
    tokens = 2 * windows * length
    removed = sum(sizes.layers[layer].exported_bytes for layer in run.removed)
    forms = 1 + any(candidate.features == "stream+norm" for candidate in run.candidates)
    weights = forms * width * width if operator is None or operator.acts else 0
    operators = len(run.spans) * weights * inputs.source.dtype.itemsize
    cost = Cost(
        below=run.num_layers,
        whole=True,
        head=True,
        batch=1,
        length=length,
        scored=tokens,
        written_bytes=sizes.exported_bytes - removed + operators,
        running_bytes=sizes.stream_bytes(windows * length),
    )
    cost.pass_tokens([la for la in range(run.num_layers) if la not in run.removed], tokens)
    return cost
