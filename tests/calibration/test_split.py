import numpy as np
import pytest

from ghost_dist.calibration.split import (
    assign_ranges,
    fold_of_range,
    folds_of_windows,
    judging_pieces,
    spread,
)
from ghost_dist.errors import ConfigError


@pytest.mark.parametrize(("num_windows", "folds"), [(32, 4), (33, 4), (7, 7), (64, 3), (9, 4)])
@pytest.mark.parametrize("sources", [0, 1])
def test_folds_hold_every_window_once_and_a_stretch_more_at_most(num_windows, folds, sources):
    tokens = np.random.default_rng(0).integers(0, 99, (num_windows, 8), dtype=np.int32)
    fold_of = folds_of_windows(tokens, [0] * num_windows * sources, folds)
    sizes = np.bincount(fold_of, minlength=folds)
    assert sizes.sum() == num_windows
    assert sizes.max() - sizes.min() <= 1 + num_windows // (4 * folds)


def test_a_fold_is_unlike_the_others_and_the_last_one_most():
    rng = np.random.default_rng(1)
    kinds = [0, 1, 1, 3, 0, 2, 3, 2] * 2  # of vocabularies that overlap less and less
    first = np.asarray([0, 3, 6, 60])
    tokens = np.stack([first[kind] + rng.integers(0, 20, 64) for kind in kinds]).astype(np.int32)
    fold_of = folds_of_windows(tokens, (), 4)
    of_kind = {
        kind: {f for f, k in zip(fold_of, kinds, strict=True) if k == kind} for kind in kinds
    }
    assert all(len(folds) == 1 for folds in of_kind.values())
    assert of_kind[3] == {3}
    assert fold_of == folds_of_windows(tokens[:, ::-1], [5] * 16, 4)


def test_neighbours_stay_together():
    tokens = np.random.default_rng(0).integers(0, 99, (64, 8), dtype=np.int32)
    fold_of = folds_of_windows(tokens, (), 4)
    assert all(len(set(fold_of[first : first + 4])) == 1 for first in range(0, 64, 4))


def test_of_several_sources_a_fold_is_of_one():
    tokens = np.zeros((12, 8), np.int32)
    assert folds_of_windows(tokens, [0] * 5 + [1] * 3 + [2] * 4, 3) == [0] * 5 + [1] * 3 + [2] * 4
    two = folds_of_windows(tokens, [0] * 5 + [1] * 7, 4)
    assert two == [0, 0, 0, 2, 2, 1, 1, 1, 1, 3, 3, 3]


def test_ranges_are_of_one_fold_and_hold_every_window_once():
    fold_of = [2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 0]
    ranges = assign_ranges(fold_of, 6)
    assert sorted(window for part in ranges for window in part) == list(range(11))
    for range_id, windows in enumerate(ranges):
        assert {fold_of[window] for window in windows} == {fold_of_range(range_id, 3)}
    assert ranges[0] == (1, 4, 7)
    assert ranges[3] == (9, 10)
    assert assign_ranges(fold_of, 4)[0::3] == [(1, 4, 7), (9, 10)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1, 2], 4), "3 calibration windows in 3 folds cannot be cut into 4 ranges"),
        (([0, 1, 2], 2), "into 2 ranges"),
    ],
)
def test_too_few_windows_or_ranges(arguments, message):
    with pytest.raises(ConfigError, match=message):
        assign_ranges(*arguments)


def test_windows_are_spread():
    assert spread(range(100), 4) == [12, 37, 62, 87]
    assert spread([1, 3, 5], 9) == [1, 3, 5]
    assert spread([1, 3, 5], 0) == [3]


def test_half_of_the_judging_pieces_are_unlike_all_others():
    random = np.random.default_rng(0)
    common = random.integers(0, 20, (2, 12, 32))
    common[0, [3, 7]] = random.integers(90, 99, (2, 32))  # like each other, so less far
    common[0, 9] = random.integers(50, 60, 32)
    common[1, 4] = 70
    first, second = judging_pieces(list(common.astype(np.int32)), 4)
    assert first[0] == 9
    assert first[1] in (3, 7)
    assert second[0] == 4
    for chosen in (first, second):
        assert len(set(chosen)) == 4
        assert chosen[2] < 6 <= chosen[3]  # the others are spread


def test_fewer_pieces_than_asked_for_are_all_taken():
    pieces = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert sorted(judging_pieces([pieces], 8)[0]) == [0, 1, 2]
    assert len(judging_pieces([pieces], 1)[0]) == 1
