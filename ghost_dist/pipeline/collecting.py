"""Fills a statistics store: every missing range is run and committed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ghost_dist.calibration.split import assign_ranges
from ghost_dist.calibration.windows import TokenWindows
from ghost_dist.engines.base import Engine
from ghost_dist.pipeline.inputs import RunInputs, open_engine
from ghost_dist.progress import Reporter
from ghost_dist.spans import Span
from ghost_dist.statistics.collect import Collector, Regressors, SampleKind, SpanCollector
from ghost_dist.statistics.store import StatisticsPlan, StatisticsStore
from ghost_dist.statistics.sums import Sums

_FLOAT64_BYTES = 8


def collect(
    store: StatisticsStore,
    tokens: TokenWindows,
    open_engine: Callable[[], Engine],
    make_collectors: Callable[[Engine], Sequence[Callable[[], Collector]]],
    reporter: Reporter,
    stage: str,
) -> int:
    """Run what is missing in the store; returns the number of ranges that were run.

    Parameters
    ----------
    store
        Whose plan names windows and sums.
    tokens
        All windows of the plan.
    open_engine
        Called only if something is missing.
    make_collectors
        Given the engine, one factory per pass over the windows; their sums together are those of
        the plan. More than one where the sums of all do not fit on the device at once.
    reporter, stage
        Where progress goes, and under which name.
    """
    missing = store.missing()
    if not missing:
        return 0
    engine = open_engine()
    passes = make_collectors(engine)
    ranges = store.plan.ranges
    done = sum(len(ranges[i]) for i in store.committed()) * tokens.window_length * len(passes)
    total = int(tokens.tokens.size) * len(passes)
    with reporter.stage(stage, total, "tokens", done) as advance:
        for range_id in missing:
            sums: dict[str, Sums] = {}
            for make in passes:
                collector = make()
                engine.run(tokens.tokens, ranges[range_id], collector, advance)
                sums |= collector.result()
            store.commit(range_id, sums)
            reporter.event("range-committed", stage=stage, range=range_id)
    return len(missing)


def mend(store: StatisticsStore, reporter: Reporter) -> None:
    """Remove what killed writers left, and discard damaged ranges, so that they are run again."""
    store.sweep()
    for range_id, reason in store.damaged().items():
        reporter.warn(f"{reason} It is discarded and run again.")
        store.discard(range_id)


def plan_of(
    inputs: RunInputs, tokens: TokenWindows, entries: dict[str, str], num_ranges: int
) -> StatisticsPlan:
    """What a store of a run's windows counts."""
    return StatisticsPlan(
        inputs={
            "model": inputs.model_fingerprint,
            "tokens": tokens.fingerprint,
            **inputs.numerics,
        },
        entries=entries,
        ranges=tuple(tuple(ids) for ids in assign_ranges(tokens.num_windows, num_ranges)),
        window_length=tokens.window_length,
    )


def collect_spans(
    inputs: RunInputs,
    store: StatisticsStore,
    tokens: TokenWindows,
    samples: Sequence[tuple[Span, SampleKind]],
    reporter: Reporter,
) -> None:
    """Take the sums of spans, all in one pass."""
    architecture = inputs.architecture

    def passes(engine: Engine) -> list[Callable[[], Collector]]:
        return [
            lambda: SpanCollector(
                samples,
                engine.hidden_size,
                engine.device,
                inner_size=architecture.inner_sizes,
                norm_eps=architecture.norm_eps,
            )
        ]

    last = max(span.stop for span, _ in samples)
    collect(store, tokens, lambda: open_engine(inputs, last), passes, reporter, "calibrate")


def entries_of(samples: Sequence[tuple[Span, SampleKind]]) -> dict[str, str]:
    """Names and kinds of the sums of spans, as a plan has them."""
    return {
        kind.key(span): "absolute" if kind.regressors == "absolute" else "moments"
        for span, kind in samples
    }


def moments_bytes(regressors: Regressors, hidden_size: int, inner_size: int) -> int:
    """Bytes of one span's sums of one kind."""
    c = hidden_size
    if regressors == "absolute":
        return 4 * c * _FLOAT64_BYTES
    z = {"stream": c, "stream+norm": 2 * c}.get(regressors, c + inner_size)
    return (z * z + z * c + z + 2 * c + 1) * _FLOAT64_BYTES
