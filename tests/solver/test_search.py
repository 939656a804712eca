"""The search for layers on made-up scores: what it finds, what it keeps to, where it goes on."""

import itertools
import math
import random

import pytest
from all_removals import exhaustive

from ghost_dist.errors import ConfigError
from ghost_dist.solver.removals import Rules
from ghost_dist.solver.search import Judges, Search, table_as_plain, table_from_plain


def scorer(num_units, seed=0, asked=None):
    """Costs of single units, less where neighbours go, more for some pairs; noise by window."""
    numbers = random.Random(seed)
    alone = [numbers.uniform(0.5, 1.5) for _ in range(num_units)]
    pairs = {p: numbers.gauss(0, 0.5) for p in itertools.combinations(range(num_units), 2)}

    def one(removal, window):
        noise = random.Random(f"{removal} {window} {seed}").gauss(0, 0.05)
        together = sum(pairs[p] for p in itertools.combinations(removal, 2))
        return 5 + sum(alone[u] for u in removal) + together + noise

    def score(removals, windows):
        if asked is not None:
            asked.extend((removal, window) for removal in removals for window in windows)
        return [[one(removal, window) for window in windows] for removal in removals]

    return score


@pytest.mark.parametrize("seed", range(8))
def test_it_finds_what_all_removals_have_best_where_greedy_does_not(seed):
    rules, score = Rules(10, 4), scorer(10, seed)
    best, _ = exhaustive(rules, score, range(4))[0]
    found = Search(rules, score, Judges(1, 4), effort=6).run()
    assert found.score <= 1.02 * best


def test_greedy_alone_is_worse_somewhere_and_swaps_mend_it():
    better = 0
    for seed in range(8):
        greedy = Search(Rules(10, 4), scorer(10, seed), Judges(1, 4), effort=1).run()
        whole = Search(Rules(10, 4), scorer(10, seed), Judges(1, 4), effort=4).run()
        assert whole.score <= greedy.score
        assert {g["step"] for g in greedy.generations} == {"greedy", "span"}
        better += whole.score < greedy.score
    assert better >= 3


@pytest.mark.parametrize(
    "bounds",
    [
        {"protect": (1, 4)},
        {"max_spans": 1},
        {"max_spans": 2, "protect": (5,)},
        # Mean 1.6: greedy alone, which sees no sizes, would come to removals that free too little.
        {"frees": (1, 1, 1, 1, 1, 1, 1, 3, 3, 3), "least": 9},
    ],
)
def test_it_keeps_to_bounds_and_loses_nothing_by_them(bounds):
    rules = Rules(10, 5, **bounds)
    allowed = [r for _, r in exhaustive(rules, scorer(10), range(1))]
    by_hand = []
    for removal in itertools.combinations(range(10), 5):
        gaps = "".join("x" if unit in removal else " " for unit in range(10)).split()
        runs = [len(gap) for gap in gaps]
        if (
            not set(removal) & set(bounds.get("protect", ()))
            and len(runs) <= bounds.get("max_spans", 10)
            and sum(bounds.get("frees", [1] * 10)[unit] for unit in removal)
            >= bounds.get("least", 0)
        ):
            by_hand.append(removal)
    assert sorted(allowed) == by_hand
    found = Search(rules, scorer(10), Judges(1, 2), effort=3, seed=1).run()
    assert found.removal in by_hand


def test_stopped_after_any_generation_it_goes_on_to_the_same():
    asked, again, table, left = [], [], {}, 0

    def search(asked, **more):
        score = scorer(9, asked=asked)
        return Search(Rules(9, 3), score, Judges(1, 3), effort=4, seed=5, **more)

    def stop(_):
        nonlocal left
        table.update(table_as_plain(stopped.table))
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    whole = search(asked).run()
    assert len(asked) == whole.evaluations
    assert {g["step"] for g in whole.generations} == {"greedy", "span", "return", "swap", "mutate"}
    for number in range(1, 1 + len(whole.generations)):
        left = number
        stopped = search(again, table=table_from_plain(table), after_generation=stop)
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
    assert search(again, table=table_from_plain(table)).run() == whole
    assert again == asked


def test_the_seed_decides_mutations_only():
    runs = [Search(Rules(9, 3), scorer(9), Judges(1, 3), effort=6, seed=s).run() for s in (0, 0, 1)]
    assert runs[0] == runs[1]
    steps = [[g for g in run.generations if g["step"] == "greedy"] for run in runs]
    assert steps[0] == steps[2]
    assert runs[0].generations != runs[2].generations


def test_the_budget_is_kept_and_may_be_too_small():
    least = Search(Rules(12, 5), scorer(12), Judges(1, 4), effort=1).budget
    for budget in (least, least + 20, 3 * least):
        asked = []
        found = Search(Rules(12, 5), scorer(12, asked=asked), Judges(1, 4), budget=budget).run()
        assert len(asked) == found.evaluations <= budget
    with pytest.raises(ConfigError, match=f"takes up to {least}. Raise selection.effort"):
        Search(Rules(12, 5), scorer(12), Judges(1, 4), budget=least - 1)


def test_a_width_is_of_the_units_that_cost_least():
    """Units cost 1 to 12 and nothing together, but what is asked of them tells where to look."""
    asked = []

    def score(removals, windows):
        asked.extend(removals)
        return [[float(sum(u + 1 for u in removal)) for _ in windows] for removal in removals]

    found = Search(Rules(12, 3), score, Judges(1, 2), effort=1, width=4).run()
    assert found.removal == (0, 1, 2)
    by_length = {n: {r for r in asked if len(r) == n} for n in (1, 2, 3)}
    assert len(by_length[1]) == 12
    assert by_length[2] == {(0, u) for u in (1, 2, 3, 4)}
    spans = {(u, u + 1, u + 2) for u in range(10)}
    assert by_length[3] == {(0, 1, u) for u in (2, 3, 4, 5)} | spans


def test_what_the_model_cannot_be_cut_at_is_left_out():
    found = Search(Rules(8, 1), scorer(8), Judges(1, 1), possible=lambda r: r[0] % 2 == 0).run()
    assert found.removal[0] % 2 == 0
    with pytest.raises(ConfigError, match="can be cut out of this model"):
        Search(Rules(8, 2), scorer(8), Judges(1, 1), possible=lambda _: False).run()


def test_removals_that_end_in_infinity_are_the_worst_and_are_written():
    def score(removals, windows):
        return [[math.inf if 3 not in r else 1.0 + sum(r) for _ in windows] for r in removals]

    search = Search(Rules(6, 2), score, Judges(1, 2), effort=3)
    assert search.run().removal == (0, 3)
    assert table_from_plain(table_as_plain(search.table)) == search.table


@pytest.mark.parametrize(
    "bounds",
    [
        {"remove": 6},
        {"remove": 3, "protect": (0, 2, 3, 4)},
        {"remove": 4, "max_spans": 1, "protect": (2,)},
    ],
)
def test_bounds_that_leave_nothing_are_named(bounds):
    with pytest.raises(ConfigError, match="No removal of .* keeps to the bounds"):
        Rules(6, **bounds)


def test_where_scores_are_rough_the_survivors_are_scored_closely_on_all_windows():
    asked = []

    def score(removals, windows):
        asked.append((len(removals), list(windows)))
        # Roughly, unit 0 seems free; closely it is dear.
        return [
            [sum(0.0 if u == 0 and w >= 8 else 10 - u if u else 99.0 for u in r) for w in windows]
            for r in removals
        ]

    judges = Judges(2, 4, rough=True)
    found = Search(Rules(10, 2), score, judges, effort=1).run()
    assert found.removal == (8, 9)
    assert {tuple(windows) for _, windows in asked} == {(8, 9, 10, 11), tuple(range(8))}
    assert sum(count * len(windows) for count, windows in asked) == found.evaluations
    assert found.score == found.scores[0] == 3.0
