"""Which engine a run gets: the whole table, and what refusals say."""

from dataclasses import replace

import pytest

from ghost_dist.engines.memory import SHARE_OF_FREE_MEMORY, DeviceNeeds, Residency, choose_engine
from ghost_dist.errors import ConfigError

GB = 1_000_000_000
NEEDS = DeviceNeeds(
    resident={"calibrate": 100 * GB, "solve": 140 * GB},
    tensor_parallel={
        1: {"calibrate": 100 * GB},
        2: {"calibrate": 51 * GB},
        4: {"calibrate": 26 * GB},
    },
    degree=1,
    streaming={
        Residency(): {"calibrate": 20 * GB, "solve": 18 * GB},
        Residency(prefetch=False): {"calibrate": 12 * GB, "solve": 10 * GB},
    },
    largest_layer=8 * GB,
)


def free_for(gigabytes):
    """Free bytes of which the share that may be filled is just so much."""
    return -(-int(gigabytes * GB) * 10_000 // int(SHARE_OF_FREE_MEMORY * 10_000)) + 2


def choose(kind, gigabytes, *, on_cluster=False, degree=1):
    return choose_engine(
        kind,
        on_cluster=on_cluster,
        needs=replace(NEEDS, degree=degree),
        free_bytes=free_for(gigabytes),
        where="GPU X",
    )


@pytest.mark.parametrize(
    ("kind", "room", "cluster", "degree", "chosen", "prefetch"),
    [
        ("auto", 140, False, 1, "resident", True),
        ("auto", 139, False, 1, "streaming", True),
        ("auto", 20, False, 1, "streaming", True),
        ("auto", 19, False, 1, "streaming", False),
        ("auto", 12, False, 1, "streaming", False),
        ("auto", 140, True, 1, "resident", True),
        ("auto", 100, True, 1, "tensor_parallel", True),
        ("auto", 400, True, 2, "tensor_parallel", True),  # as configured, though one would do
        ("auto", 51, True, 2, "tensor_parallel", True),
        ("resident", 140, False, 1, "resident", True),
        ("tensor_parallel", 26, True, 4, "tensor_parallel", True),
        ("streaming", 400, False, 1, "streaming", True),
        ("streaming", 13, False, 1, "streaming", False),
    ],
)
def test_the_first_that_fits(kind, room, cluster, degree, chosen, prefetch):
    choice = choose(kind, room, on_cluster=cluster, degree=degree)
    assert (choice.kind, choice.prefetch) == (chosen, prefetch)
    needs = {
        "resident": NEEDS.resident,
        "tensor_parallel": NEEDS.tensor_parallel[degree],
        "streaming": NEEDS.streaming[Residency(prefetch=prefetch)],
    }
    assert choice.device_bytes == needs[chosen]
    assert f"{max(needs[chosen].values()) / 1e9:.2f} GB" in choice.reason
    assert "GPU X" in choice.reason


@pytest.mark.parametrize(
    ("kind", "room", "cluster", "degree", "words"),
    [
        ("resident", 139, False, 1, ["140.00 GB", "(solve)", "streaming needs 20.00 GB"]),
        ("resident", 139, False, 1, ["engine.tensor_parallel=1 needs 100.00 GB"]),
        ("resident", 60, False, 1, ["tensor_parallel=2 needs 51.00 GB on each of 2"]),
        ("resident", 13, False, 1, ["streaming without prefetch needs 12.00 GB"]),
        ("tensor_parallel", 50, True, 2, ["51.00 GB on each rank", "tensor_parallel=4 needs 26"]),
        ("auto", 50, True, 2, ["51.00 GB on each rank", "engine.tensor_parallel=4"]),
        (
            "auto",
            11,
            False,
            1,
            ["12.00 GB", "layer alone is 8.00 GB", "14.12 GB free is the least"],
        ),
        ("streaming", 11, False, 1, ["even one layer at a time", "12.00 GB"]),
    ],
)
def test_a_refusal_says_what_is_needed_what_is_free_and_what_would_fit(
    kind, room, cluster, degree, words
):
    with pytest.raises(ConfigError) as refused:
        choose(kind, room, on_cluster=cluster, degree=degree)
    message = str(refused.value)
    for word in [*words, f"{free_for(room) / 1e9:.2f} GB free", "85%", "GPU X"]:
        assert word in message, message


PARTS = replace(
    NEEDS,
    streaming=NEEDS.streaming
    | {Residency(n): {"calibrate": (4 + n) * GB, "solve": 5 * GB} for n in range(1, 8)},
)


def choose_parts(gigabytes, experts="auto", kind="auto"):
    return choose_engine(
        kind,
        on_cluster=False,
        needs=PARTS,
        free_bytes=free_for(gigabytes),
        where="GPU X",
        experts=experts,
    )


@pytest.mark.parametrize(
    ("room", "experts", "held"),
    [
        (140, "auto", "resident"),
        (20, "auto", None),  # whole layers
        (19, "auto", 4),  # two parts at least, of like sizes
        (9, "auto", 4),
        (8, "auto", 4),
        (7, "auto", 3),
        (6, "auto", 2),
        (5, "auto", 1),
        (30, 3, 3),
        (7, 3, 3),
        (30, 8, None),  # all of them
    ],
)
def test_experts_of_layers_that_do_not_fit(room, experts, held):
    choice = choose_parts(room, experts)
    if held == "resident":
        assert (choice.kind, choice.experts) == ("resident", None)
        return
    assert (choice.kind, choice.experts, choice.prefetch) == ("streaming", held, True)
    if held is None:
        assert choice.device_bytes == NEEDS.streaming[Residency()]
        assert "three layers at a time need 20.00 GB" in choice.reason
    else:
        assert choice.device_bytes == PARTS.streaming[Residency(held)]
        assert f"with {held} of 8 routed experts at a time need {4 + held}.00" in choice.reason


@pytest.mark.parametrize(
    ("room", "experts", "kind", "words"),
    [
        (
            4,
            "auto",
            "auto",
            ["even 1 of 8 routed", "need 5.00 GB (calibrate", "5.88 GB free is the"],
        ),
        (6, 3, "streaming", ["even 3 of 8 routed experts", "need 7.00 GB (calibrate", "auto"]),
        (12, 8, "streaming", ["engine.experts=auto"]),
        (12, "auto", "resident", ["engine.kind=streaming with engine.experts=auto"]),
    ],
)
def test_a_refusal_says_what_an_expert_needs(room, experts, kind, words):
    if words == ["engine.experts=auto"]:
        # All experts at once, as the user says: one layer at a time is the least then.
        assert choose_parts(room, experts, kind).prefetch is False
        return
    with pytest.raises(ConfigError) as refused:
        choose_parts(room, experts, kind)
    for word in [*words, "8.00 GB" if kind != "resident" else "GB", "GPU X"]:
        assert word in str(refused.value), str(refused.value)
