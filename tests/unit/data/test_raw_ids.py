"""Raw ids of a log's own values: the same everywhere, within the range of a raw column, and 0 for null."""

import numpy as np
import pyarrow as pa
import pytest

from gr.data.raw_ids import raw_ids
from gr.errors import DataError
from gr.schema import RAW_IDS


def test_a_value_has_one_id() -> None:
    ids = raw_ids(["b", None, "a", "b"])
    assert ids.dtype == np.int64
    assert ids[0] == ids[3] != ids[2]
    assert ids[1] == 0
    assert np.array_equal(ids, raw_ids(pa.chunked_array([["b", None], ["a", "b"]])))
    assert ids[2] == 3_405_396_810_240_292_929, "what is written in a folder is read by later releases"


def test_ids_are_in_the_range_of_a_raw_column() -> None:
    ids = raw_ids(range(10_000))
    assert len(np.unique(ids)) == 10_000
    assert 1 <= ids.min()
    assert 2**62 < ids.max() < RAW_IDS
    assert np.array_equal(raw_ids(["7"]), raw_ids([7]))


@pytest.mark.parametrize("values", [[1.5], [["a"]], [1, "a"]])
def test_refuses_other_values(values: list) -> None:
    with pytest.raises(DataError, match="raw ids"):
        raw_ids(values)


def test_no_values() -> None:
    assert len(raw_ids(pa.array([], pa.string()))) == 0
