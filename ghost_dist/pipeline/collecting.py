"""Fills a statistics store: every missing range is run and committed once."""

from functools import partial
from pathlib import Path
from typing import Protocol

from ghost_dist.calibration.split import assign_ranges
from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.pipeline.collectors import Collectors, RangeTimes, sums_of_range
from ghost_dist.pipeline.inputs import RunInputs, open_engine
from ghost_dist.pipeline.texts import fold_of_window
from ghost_dist.progress import Reporter
from ghost_dist.statistics.at_hand import StoreAtHand
from ghost_dist.statistics.store_plan import StatisticsPlan


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
    """One process with the whole model."""

    def __init__(self, inputs: RunInputs, reporter: Reporter) -> None:
        self._inputs, self._reporter = inputs, reporter

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
        missing = store.missing()
        if not missing:
            return
        engine = open_engine(self._inputs, collectors.last_boundary)
        ranges = store.plan.ranges
        done = sum(len(ranges[i]) for i in store.committed()) * tokens.window_length
        total = int(tokens.tokens.size)
        with self._reporter.stage(stage, total, "tokens", done) as advance:
            for range_id in missing:
                sums, times = sums_of_range(
                    engine, tokens.tokens, ranges[range_id], collectors, advance
                )
                of_range = {"stage": stage, "range": range_id}
                self._reporter.event("range-ran", **of_range, **RangeTimes.told([times]))
                committed = partial(self._reporter.event, "range-committed", **of_range)
                store.keep(range_id, sums, committed)
        if not to_fit:
            store.flush()


def open_store(path: Path, plan: StatisticsPlan, reporter: Reporter) -> StoreAtHand:
    """What killed writers left is removed; damaged ranges are discarded, to be run again."""
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
