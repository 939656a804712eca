"""Peak bytes of every stage on the device, in host memory and on the disk, for each engine.

Device: weights, activations of one batch, streams that wait for their partner, sums, temporaries
of products, logits of a piece. Host: what waits there. These are the tensors that the code holds
at the same time; allocators and libraries come on top, which the 15 % that a plan leaves are for.
"""

from __future__ import annotations

from collections.abc import Sequence

from ghost_dist.checkpoint.weight_reader import BLOCK_BYTES, READERS
from ghost_dist.engines.layer_memory import Residency, activation_bytes, logits_bytes
from ghost_dist.planning.engine_choice import DeviceNeeds
from ghost_dist.planning.run_shape import RunShape
from ghost_dist.solver.least_squares import fit_bytes
from ghost_dist.statistics.moments import BLOCK_COLUMNS
from ghost_dist.statistics.pair_sums import FLUSH_TOKENS as PAIR_FLUSH_TOKENS

PINNED_BYTES = 2 * READERS * BLOCK_BYTES
"""streaming: buffers that layers are read into, two a reader."""
_FLOAT64_BYTES = 8
_FEW_BYTES = 64 << 20  # scores of other criteria, masks, positions


def device_needs(
    run: RunShape, *, ranks: int | None, degrees: Sequence[int], degree: int, on_cpu: bool
) -> DeviceNeeds:
    """Peak bytes on one device by stage; on a CPU with what waits in host memory.

    ``ranks``: of a replica, and only what ranks do is counted; None: no cluster.
    """
    collecting = ["select", "calibrate"] if run.selection is not None else ["calibrate"]
    wanted = [*collecting] if ranks is not None else [*collecting, "solve", "export"]
    if run.evaluation_tokens and ranks is None:
        wanted.append("evaluate")

    def waiting(name: str, engine: str) -> int:
        return host_bytes(run, name, engine, copies=0) if on_cpu else 0

    def resident(names: Sequence[str], degree: int = 1) -> dict[str, int]:
        return {name: _resident(run, name, degree) + waiting(name, "resident") for name in names}

    def streaming(held: Residency) -> dict[str, int]:
        asked = on_cpu and held.experts is not None
        return {
            name: _streaming(run, name, held)
            + waiting(name, "streaming")
            + (asked_bytes(run, name, ranks) if asked else 0)
            for name in wanted
        }

    ways = [Residency(), *map(Residency, range(1, run.sizes.experts)), Residency(prefetch=False)]
    return DeviceNeeds(
        resident=resident(wanted),
        tensor_parallel={n: resident(collecting, n) for n in sorted({*degrees, degree})},
        degree=degree,
        streaming={held: streaming(held) for held in ways},
        largest_layer=run.sizes.largest_layer_bytes,
    )


def host_bytes(run: RunShape, stage: str, engine: str, *, copies: int) -> int:
    """What waits in host memory, beside the mapped files; on a CPU it adds to the device's.

    ``copies`` of the sums of a range are there while it is written: none on a CPU, where they are
    in host memory already, one from a GPU, two on a rank that writes one range and computes the
    next.
    """
    sizes, tokens = run.sizes, run.num_tokens
    sums = {"select": _selection_bytes(run), "calibrate": run.samples_bytes}.get(stage, 0)
    total = copies * sums
    if stage == "select" and engine != "streaming":
        total += kept_streams_bytes(run)
    if stage == "solve":
        largest = max((sample.nbytes for sample in run.samples), default=0)
        total += fit_bytes(run.folds * largest, run.folds)
        if run.refits or run.heal:
            total += 3 * sizes.stream_bytes(tokens)  # dense, recovered, and one being made
    if engine == "streaming" and copies:
        total += PINNED_BYTES
    return total


def tokens_at_once(run: RunShape, stage: str, ranks: int | None) -> int:
    """streaming: calibration tokens that go through a layer before the next one is read.

    ``ranks``: of a replica, which share a range; None: all windows go through in this process.
    """
    if ranks is None or stage not in ("select", "calibrate"):
        return run.num_tokens
    of_range = -(-run.num_windows // (run.folds if stage == "select" else run.num_ranges))
    return -(-of_range // ranks) * run.window_length


def streams_bytes(run: RunShape, stage: str, ranks: int | None = None) -> int:
    """streaming: streams between two layers, and rows that are kept until the sums are taken."""
    sizes, tokens = run.sizes, tokens_at_once(run, stage, ranks)
    streams = sizes.stream_bytes(tokens)
    if stage == "calibrate":
        boundaries = {b for span in run.spans for b in (span.start, span.stop)}
        inner = {
            sample.span.start - 1: run.inner_sizes[sample.span.start - 1]
            for sample in run.samples
            if sample.kind == "joint"
        }
        rows = len(boundaries) * sizes.hidden_size
        rows += sum(size + sizes.hidden_size for size in inner.values())
        return streams + tokens * rows * sizes.itemsize
    if stage == "select":
        if (kept := kept_streams_bytes(run)) > 0:
            return streams + kept
        # Boundaries from a start to its stop wait; one more is being made.
        assert run.selection is not None
        longest = max([1, *(span.stop - span.start for span in run.spans)])
        return streams + (longest + 1) * sizes.stream_bytes(tokens)
    if stage == "solve" and run.by_kl:
        judged = run.num_tokens * run.validation_folds // run.folds
        return (run.shifts + run.fine_shifts + 1) * sizes.stream_bytes(judged)
    if stage == "evaluate":
        return 3 * sizes.stream_bytes(sum(run.evaluation_tokens.values()))  # one sweep for all
    return streams


def kept_streams_bytes(run: RunShape) -> int:
    """Streams of all boundaries, which a search for layers fits operators from."""
    if run.selection is None or run.selection.search is None:
        return 0
    return (run.num_layers + 1) * run.sizes.stream_bytes(run.selection.search.fitted_tokens)


def asked_bytes(run: RunShape, stage: str, ranks: int | None) -> int:
    """streaming with experts in parts: what all tokens ask of a layer's experts, and the answers.

    The input of the experts, and a product for each expert of a token.
    """
    if stage in ("select", "calibrate"):
        streams = run.sizes.stream_bytes(tokens_at_once(run, stage, ranks))
    else:
        streams = streams_bytes(run, stage)
    return (1 + run.sizes.experts_per_token) * streams


def _resident(run: RunShape, stage: str, degree: int = 1) -> int:
    sizes, batch_tokens = run.sizes, run.batch * run.window_length
    logits = logits_bytes(batch_tokens, sizes.vocab_size)
    activations = activation_bytes(batch_tokens, sizes.hidden_size, sizes.widest, sizes.itemsize)
    if stage == "select" and run.selection is not None and run.selection.search is not None:
        # The dense model's stream and a variant's; distributions of both, and one being made.
        return sizes.causal_lm_bytes + activations + 2 * sizes.stream_bytes(batch_tokens) + logits
    if stage == "select":
        weights = sizes.decoder_bytes(run.num_layers, degree)
        waiting = (_longest(run) + 1) * sizes.stream_bytes(batch_tokens)
        if run.selection is not None and run.selection.stops_of:
            # On a GPU rows of all starts wait until there are enough for one product.
            starts = min(len(run.selection.stops_of), run.selection.starts_at_once)
            rows = min(run.num_tokens, max(batch_tokens, PAIR_FLUSH_TOKENS))
            waiting = (starts + _longest(run)) * sizes.stream_bytes(rows)
        return weights + activations + waiting + _selection_bytes(run) // degree
    if stage == "calibrate":
        weights = sizes.decoder_bytes(run.last_boundary, degree)
        waiting = len(run.spans) * sizes.stream_bytes(batch_tokens) + sum(
            batch_tokens
            * (4 * sizes.hidden_size + run.inner_sizes[s.span.start - 1] * sizes.itemsize)
            for s in run.samples
            if s.kind == "joint"
        )
        sums = run.samples_bytes // degree
        return weights + activations + waiting + sums + _product_bytes(run)
    if stage == "solve":
        if not run.runs_whole_model:
            return _FEW_BYTES  # a fit goes to the CPU where the device has no room for it
        candidates = run.shifts + run.fine_shifts
        streams = candidates * sizes.stream_bytes(batch_tokens)
        return (
            sizes.causal_lm_bytes
            + activations
            + streams
            + logits_bytes(batch_tokens, sizes.vocab_size)
        )
    if stage == "export":
        # The uncut model here; then the exported one, which is smaller, in a process of its own.
        return sizes.causal_lm_bytes + activations
    streams = 3 * sizes.stream_bytes(batch_tokens)  # of the three variants
    return sizes.causal_lm_bytes + activations + streams + logits


def _streaming(run: RunShape, stage: str, held: Residency) -> int:
    sums = {
        "select": _selection_bytes(run),
        "calibrate": run.samples_bytes + _product_bytes(run),
    }.get(stage, 0)
    searches = run.selection is not None and run.selection.search is not None
    head = stage in ("evaluate", "export") or (
        (stage == "solve" and run.by_kl) or (stage == "select" and searches)
    )
    layers = run.sizes.layer_bytes(run.batch * run.window_length, head=head)
    return max(layers.at_once(held), sums)  # sums are taken range by range at the end of a sweep


def _selection_bytes(run: RunShape) -> int:
    if run.selection is None or not run.selection.stops_of:
        return _FEW_BYTES
    starts = min(len(run.selection.stops_of), run.selection.starts_at_once)
    return starts * run.selection.start_bytes


def _longest(run: RunShape) -> int:
    return max(span.stop - span.start for span in run.spans)


def _product_bytes(run: RunShape) -> int:
    """Temporaries of one product of sums: wide copies of a block of rows, and the product."""
    largest = max((sample.size for sample in run.samples), default=0)
    columns = min(BLOCK_COLUMNS, largest)
    rows = run.window_length * (largest + 2 * columns + run.sizes.hidden_size)
    return (rows + columns * columns) * _FLOAT64_BYTES
