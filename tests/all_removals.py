"""Every removal with its score: what a search is compared with where there are few."""

import itertools
import math


def exhaustive(rules, score, windows):
    """Pairs of the mean score and the removal, of all that the rules allow, the best first."""
    free = [unit for unit in range(rules.num_units) if unit not in rules.protect]
    removals = [r for r in itertools.combinations(free, rules.remove) if rules.allow(r)]
    scores = score(removals, windows)
    return sorted((math.fsum(s) / len(windows), r) for s, r in zip(scores, removals, strict=True))
