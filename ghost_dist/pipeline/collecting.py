"""Fills a statistics store: every missing range is run and committed once."""

import shutil
from functools import partial
from pathlib import Path
from typing import Protocol

from ghost_dist.calibration.split import assign_ranges
from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.durable import fingerprint
from ghost_dist.errors import CorruptStoreError
from ghost_dist.pipeline.collectors import (
    Collectors,
    RangeTimes,
    kept_numbers,
    last_boundary,
    sums_of_range,
    wanted,
)
from ghost_dist.pipeline.inputs import RunInputs, check_disk_space, open_engine
from ghost_dist.pipeline.offloading import open_offloaded_engine
from ghost_dist.pipeline.texts import fold_of_window
from ghost_dist.progress import Reporter
from ghost_dist.statistics.at_hand import StoreAtHand
from ghost_dist.statistics.store import remove_store
from ghost_dist.statistics.store_plan import StatisticsPlan, stored_plan
from ghost_dist.statistics.stream_state import StreamState
from ghost_dist.statistics.sums import WHOLE


class Collect(Protocol):
    """Fills a store, in this process or on a cluster."""

    def __call__(
        self,
        store: StoreAtHand,
        tokens: TokenWindows,
        collectors: Collectors,
        stage: str,
        *,
        to_fit: bool = False,
    ) -> None:
        """Run every range that is missing in the store, and commit it.

        With ``to_fit`` spans are fitted from the store next: the last ranges may still be on their
        way to the disk; ``store.flush`` waits.
        """

    def release(self) -> None:
        """Nothing more will be collected for now: give back what is kept between stages."""
        return


class CollectHere(Collect):
    """In this process, with the whole model or layer by layer.

    Streams of the latter are saved below ``folder``, RUN, while a stage runs.
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
        """See :class:`Collect`."""
        if not store.missing():  # a kill may have come before they were removed
            shutil.rmtree(self._folder / f"streams-{stage}", ignore_errors=True)
            return
        fill = self._layer_by_layer if self._inputs.streaming else self._range_by_range
        fill(store, tokens, collectors, stage)
        if not to_fit:
            store.flush()

    def _range_by_range(
        self, store: StoreAtHand, tokens: TokenWindows, collectors: Collectors, stage: str
    ) -> None:
        engine = open_engine(self._inputs, last_boundary(collectors))
        ranges = store.plan.ranges
        done = sum(len(ranges[i]) for i in store.committed()) * tokens.window_length
        total = int(tokens.tokens.size)
        with self._reporter.stage(stage, total, "tokens", done) as advance:
            for range_id in store.missing():
                sums, times = sums_of_range(
                    engine, tokens.tokens, ranges[range_id], collectors, advance
                )
                of_range = {"stage": stage, "range": range_id}
                self._reporter.event("range-ran", **of_range, **RangeTimes.told([times]))
                committed = partial(self._reporter.event, "range-committed", **of_range)
                store.keep(range_id, sums, committed)

    def _layer_by_layer(
        self, store: StoreAtHand, tokens: TokenWindows, collectors: Collectors, stage: str
    ) -> None:
        """All ranges in one pass over the files."""
        inputs, ranges, missing = self._inputs, store.plan.ranges, store.missing()
        windows = sorted(window for range_id in missing for window in ranges[range_id])
        boundaries, mlp_layers = wanted(collectors)
        identity = {"plan": store.plan_fingerprint, "boundaries": boundaries, "mlp": mlp_layers}
        folder = self._folder / f"streams-{stage}"
        state = StreamState(folder, fingerprint(identity), windows)
        column = len(state.windows) * tokens.window_length * inputs.dtype.itemsize
        needs = {
            "saved streams": 2 * column * inputs.architecture.hidden_size,
            "kept streams": column * kept_numbers(inputs.architecture, collectors),
        }
        check_disk_space(self._folder, needs)
        engine = open_offloaded_engine(inputs, boundaries[-1], 1 + len(boundaries))
        try:
            total = len(state.windows) * tokens.window_length
            with self._reporter.stage(stage, total, "tokens") as advance:
                sweep = partial(engine.sweep, tokens.tokens, state.windows, boundaries, mlp_layers)
                try:
                    rows = sweep(advance, state)
                except CorruptStoreError as error:
                    self._reporter.warn(f"{error} The stage begins again.")
                    state.remove()
                    state = StreamState(folder, fingerprint(identity), windows)
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


def open_store(
    path: Path, plan: StatisticsPlan, reporter: Reporter, *, renew: bool = False
) -> StoreAtHand:
    """What killed writers left is removed; damaged ranges are discarded, to be run again.

    ``renew``: a store of another plan makes room, else it is an error.
    """
    if renew and stored_plan(path) not in (None, plan):
        remove_store(path)
    store = StoreAtHand(path, plan)
    store.sweep()
    for range_id, reason in store.damaged().items():
        reporter.warn(f"{reason} It is discarded and run again.")
        store.discard(range_id)
    return store


def plan_of(
    inputs: RunInputs, tokens: TokenWindows, collectors: Collectors, num_ranges: int | None = None
) -> StatisticsPlan:
    """What a store of these collectors counts, in the ranges of the run or in so many."""
    fold_of = fold_of_window(inputs, tokens)
    return StatisticsPlan(
        inputs={
            "model": inputs.model_fingerprint,
            "tokens": tokens.fingerprint,
            **inputs.numerics,
        },
        entries=collectors.entries,
        ranges=tuple(assign_ranges(fold_of, num_ranges or inputs.num_ranges)),
        window_length=tokens.window_length,
        blocks=inputs.config.engine.ranks,
    )
