"""Work ahead: how much of it, and what becomes of errors, ends and threads."""

import threading
from collections.abc import Generator

import numpy as np
import pytest

from gr.data.prefetch import Ahead, RowGroupCache


def numbers(made: list[int], stop: int, error: BaseException | None = None) -> Generator[int, None, None]:
    try:
        for number in range(stop):
            made.append(number)
            yield number
        if error is not None:
            raise error
    finally:
        made.append(-1)


def test_items_in_order_and_the_end_again_and_again() -> None:
    made: list[int] = []
    ahead = Ahead(numbers(made, 5), capacity=2)
    assert [next(ahead) for _ in range(5)] == list(range(5))
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(ahead)
    assert made == [0, 1, 2, 3, 4, -1]


def test_no_more_than_the_capacity_is_made_ahead() -> None:
    made: list[int] = []
    before = threading.active_count()
    ahead = Ahead(numbers(made, 100), capacity=3)
    next(ahead)
    next(ahead)
    ahead.close()
    ahead.close()
    assert made[-1] == -1 and 2 <= len(made) - 1 <= 5 and threading.active_count() == before
    with pytest.raises(StopIteration):
        next(ahead)


def test_an_error_comes_in_its_turn_and_stays_after_close() -> None:
    ahead = Ahead(numbers([], 2, ValueError("torn")), capacity=4)
    assert [next(ahead), next(ahead)] == [0, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="torn"):
            next(ahead)
        ahead.close()


def test_a_row_group_is_decoded_once_and_forgotten_by_age() -> None:
    reads: list[int] = []

    def read(group: int) -> int:
        reads.append(group)
        return 10 * group

    cache = RowGroupCache(read, threads=1, capacity=2)
    groups, index_B = cache.request(np.array([4, -1, 2, 4]))
    assert [group.result() for group in groups] == [20, 40] and index_B.tolist() == [1, -1, 0, 1]
    cache.request(np.array([2]))
    cache.request(np.array([7]))  # 4 is the oldest
    groups, index_B = cache.request(np.array([-1, -1]))
    assert groups == [] and index_B.tolist() == [-1, -1]
    assert [group.result() for group in cache.request(np.array([2, 4]))[0]] == [20, 40]
    cache.close()
    assert reads == [2, 4, 7, 4]
