"""Search for attentions, MLPs and layers by score per parameter."""

import json

import pytest

from ghost_dist.errors import ConfigError
from ghost_dist.pipeline.recover import recover
from ghost_dist.pipeline.searching_units import UnitScoring
from ghost_dist.solver.search import Judges
from ghost_dist.solver.unit_search import UnitSearch

SIZES = [5, 9, 4, 10, 6, 8]  # of the halves of three layers
COSTS = [1.0, 9.0, 0.4, 0.5, 3.0, 0.8]


def search(units, target, *, both=0.0, exchanges=0, **arguments):
    """Costs add up; the last two halves together cost more by ``both``."""
    asked = []

    def score(removals, windows):
        asked.extend(removals)
        return [
            [sum(COSTS[h] for h in r) + both * ({4, 5} <= set(r)) + w / 100 for w in windows]
            for r in removals
        ]

    def net(removal):
        return sum(SIZES[half] for half in removal)

    found = UnitSearch(
        units,
        net,
        target,
        score,
        Judges(1, 4),
        slack=1,
        width=20,
        exchanges=exchanges,
        **arguments,
    )
    return found, asked


def test_what_costs_least_per_parameter_goes_until_nothing_fits():
    halves = [(half,) for half in range(6)]
    one, _ = search(halves, 22)
    found = one.run()
    # By cost per parameter: 3 (0.05), 2 and 5 (0.1); then 22 parameters have gone.
    assert found.removal == (2, 3, 5)
    assert found.candidates == 6 + 5 + 2  # beside 3 and 5 only 0 and 2 fit
    assert found.score == pytest.approx(1.7, abs=0.02)
    whole, _ = search([*halves, (2, 3), (4, 5)], 15)
    assert whole.run().removal == (2, 3)


def test_an_exchange_undoes_what_was_greedy():
    halves = [(half,) for half in range(6)]
    sizes = {"target": 14, "both": 0.0}
    greedy, _ = search(halves, **sizes)
    assert greedy.run().removal == (2, 3)
    other, _ = search(halves, 18, exchanges=4)
    assert other.run().score <= search(halves, 18)[0].run().score


def test_what_is_less_than_half_a_unit_is_refused():
    """4 parameters, and 5 with the slack, are less than these."""
    nothing, _ = search([(1,), (3,)], 4)
    with pytest.raises(ConfigError, match=r"remove is 4 parameters.*the smallest has 9.*Raise it"):
        nothing.run()


def test_a_stopped_search_scores_nothing_again():
    halves = [(half,) for half in range(6)]
    one, asked = search(halves, 22, exchanges=3)
    expected = one.run()
    again, repeated = search(halves, 22, exchanges=3, table=one.table)
    assert again.run() == expected
    assert asked
    assert not repeated


@pytest.mark.parametrize("units", ["sublayers", "auto"])
def test_a_run_removes_as_many_parameters_as_are_asked_for(make_config, monkeypatch, units):
    config = make_config(
        selection__spans=None,
        selection__criterion="search",
        selection__units=units,
        selection__remove=2,
        selection__effort="quick",
    )
    scored = []
    real = UnitScoring.__call__

    def watched(self, removals, windows):
        found = real(self, removals, windows)
        scored.append(len(removals))
        assert all(kl > 0 for row in found for kl in row)
        return found

    monkeypatch.setattr(UnitScoring, "__call__", watched)
    result = recover(config)
    search = result["selection"]["search"]
    assert scored
    assert result["sublayers"] or units == "auto"
    gone = result["parameters"]["before"] - result["parameters"]["after"]
    smallest = 0.6 * search["target"] / 4
    assert abs(gone - search["target"]) <= smallest
    assert gone == pytest.approx(search["parameters"], rel=0.02)
    assert result["reload_max_abs_difference"] < 1e-4
    assert json.dumps(result)
