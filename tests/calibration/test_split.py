import pytest

from ghost_dist.calibration.split import assign_ranges, fold_of_range
from ghost_dist.errors import ConfigError


@pytest.mark.parametrize(("num_windows", "num_ranges"), [(32, 8), (33, 8), (7, 7), (5, 1), (29, 4)])
def test_ranges_hold_every_window_once_and_differ_by_at_most_one(num_windows, num_ranges):
    ranges = assign_ranges(num_windows, num_ranges)
    assert [window for part in ranges for window in part] == list(range(num_windows))
    sizes = [len(part) for part in ranges]
    assert len(sizes) == num_ranges
    assert max(sizes) - min(sizes) <= 1


def test_folds_split_the_windows_and_each_samples_the_whole_corpus():
    ranges = assign_ranges(40, 8)
    held_out = {k: set() for k in range(4)}
    for range_id, windows in enumerate(ranges):
        held_out[fold_of_range(range_id, 4)].update(windows)
    assert sum(map(len, held_out.values())) == len(set().union(*held_out.values())) == 40
    assert all(len(fold) == 10 for fold in held_out.values())
    assert all(min(fold) < 20 <= max(fold) for fold in held_out.values())


def test_two_pieces_of_a_range_are_those_of_two_ranges_of_its_fold():
    eight, four = assign_ranges(33, 8), assign_ranges(33, 4, pieces=2)
    assert four == [eight[k] + eight[k + 4] for k in range(4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4), "3 calibration windows cannot be cut into 4 ranges"),
        ((3, 0), "into 0 ranges"),
    ],
)
def test_too_few_windows_or_ranges(arguments, message):
    with pytest.raises(ConfigError, match=message):
        assign_ranges(*arguments)
