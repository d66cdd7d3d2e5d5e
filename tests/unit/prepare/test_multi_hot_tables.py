"""The tables of MLPerf's DLRM-v2 data, against the recipe as it is published."""

import numpy as np
import pytest

from gr.errors import ConfigError
from gr.prepare import multi_hot
from gr.prepare.multi_hot import MLPERF_HOTS, multi_hot_tables
from tests.support.published_multi_hot import published_tables

SIZES = (4, 50, 1, 300, 7, 129)
HOTS = (3, 1, 2, 5, 1, 100)


@pytest.mark.parametrize("draws", [1, 37, 1 << 22])
def test_bit_equal_to_the_published_recipe(monkeypatch: pytest.MonkeyPatch, draws: int) -> None:
    monkeypatch.setattr(multi_hot, "_DRAWS_AT_ONCE", draws)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    tables = multi_hot_tables(SIZES, HOTS)
    assert np.array_equal(before, np.random.get_state()[1]), "the global stream is not ours"  # type: ignore[index]
    state = np.random.get_state()
    for mine, theirs in zip(tables, published_tables(SIZES, HOTS), strict=True):
        assert mine.dtype == np.int32
        np.testing.assert_array_equal(mine, theirs)
    np.random.set_state(state)


def test_numbers_do_not_drift() -> None:
    """Known values: a numpy whose legacy stream changed would pass the test above."""
    first, second = multi_hot_tables([10, 1000], [4, 3])
    assert first[:3].tolist() == [[0, 5, 0, 3], [1, 3, 7, 9], [2, 3, 5, 2]]
    assert second[:2].tolist() == [[0, 850, 99], [1, 984, 177]]


def test_sizes() -> None:
    assert len(MLPERF_HOTS) == 26 and sum(MLPERF_HOTS) == 214  # ids a row
    for cardinalities, hots in [([3, 4], [1]), ([3], [0])]:
        with pytest.raises(ConfigError, match="give one of at least 1 a column"):
            multi_hot_tables(cardinalities, hots)
