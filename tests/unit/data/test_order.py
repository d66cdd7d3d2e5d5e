"""The training order: every example once an epoch, the same for every world size, from any position."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr.data.order import TrainingOrder, owned_lanes, permutation
from gr.errors import ConfigError

row_counts = st.lists(st.integers(1, 9), min_size=1, max_size=8).filter(lambda counts: sum(counts) >= 8)
LANES = 8


@given(counts=row_counts, seed=st.integers(0, 2**63), epoch=st.integers(0, 3))
def test_each_row_once_an_epoch_of_its_lane(counts: list[int], seed: int, epoch: int) -> None:
    order = TrainingOrder(counts, lanes=LANES, seed=seed, shuffle=True)
    lengths = [order.lane_length(lane) for lane in range(LANES)]
    assert max(lengths) - min(lengths) <= 1
    rows = [order.lane_rows(lane, epoch * n, n) for lane, n in enumerate(lengths)]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(sum(counts)))


@given(counts=row_counts, start=st.integers(0, 30), first=st.integers(1, 9), second=st.integers(1, 9))
def test_position_is_the_whole_state(counts: list[int], start: int, first: int, second: int) -> None:
    order = TrainingOrder(counts, lanes=LANES, seed=3, shuffle=True)
    for lane in range(LANES):
        whole = order.lane_rows(lane, start, first + second)
        parts = [order.lane_rows(lane, start, first), order.lane_rows(lane, start + first, second)]
        np.testing.assert_array_equal(whole, np.concatenate(parts))


@given(counts=row_counts, steps=st.integers(1, 5), per_lane=st.integers(1, 3))
def test_unshuffled_is_file_order(counts: list[int], steps: int, per_lane: int) -> None:
    order = TrainingOrder(counts, lanes=LANES, seed=0, shuffle=False)
    size = per_lane * LANES
    for step in range(steps):
        rows = np.concatenate([order.lane_rows(lane, step * per_lane, per_lane) for lane in range(LANES)])
        np.testing.assert_array_equal(rows, np.arange(step * size, (step + 1) * size) % sum(counts))


@given(counts=row_counts)
def test_rows_stay_in_their_row_group_when_shuffled(counts: list[int]) -> None:
    order = TrainingOrder(counts, lanes=1, seed=5, shuffle=True)
    rows = order.lane_rows(0, 0, order.rows)
    groups, within = order.locate(rows)
    assert np.count_nonzero(np.diff(groups)) == len(counts) - 1
    starts = np.cumsum([0, *counts])[:-1]
    np.testing.assert_array_equal(starts[groups] + within, rows)


def test_epochs_and_seeds_differ() -> None:
    orders = [TrainingOrder([50, 50], lanes=1, seed=seed, shuffle=True) for seed in (1, 2)]
    epochs = [orders[0].lane_rows(0, 100 * epoch, 100) for epoch in range(2)] + [orders[1].lane_rows(0, 0, 100)]
    for one, two in ((0, 1), (0, 2)):
        assert (epochs[one] == epochs[two]).mean() < 0.2


def test_the_order_of_a_seed_is_fixed_for_good() -> None:
    """A checkpoint's position means nothing if a new release shuffles otherwise."""
    assert permutation(1, 0, None, 8).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]
    assert permutation(1, 2, 3, 8).tolist() != permutation(1, 2, 4, 8).tolist()


def test_owned_lanes() -> None:
    assert [list(owned_lanes(4, rank, 2)) for rank in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(ConfigError, match=r"data\.lanes=8 .*world size 3; run on one of \[1, 2, 4, 8\] ranks"):
        owned_lanes(8, 0, 3)


def test_more_lanes_than_rows() -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes=8 is more than the 5 rows"):
        TrainingOrder([2, 3], lanes=8, seed=0, shuffle=True)
