"""Questions read from files: the rows of a rank, in tables of a given size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data.vocabulary import Vocabulary
from gr.errors import ConfigError
from gr.models.saved import ALONE
from gr.recipes.answers import read_listed, read_rows
from gr.recipes.base import Request


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_ids_of_every_type_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"user_id": pa.array(["b", "z", None, "a"], kind)}), tmp_path / "users.parquet")
    users = Vocabulary("user_id", np.array([1, 2]), pa.array(["a", "b"]))
    listed = read_listed(tmp_path / "users.parquet", users)
    assert listed.ids_N.tolist() == [1, 2] and listed.unknown_N.to_pylist() == ["z", None]


def test_a_table_knows_its_place_in_the_file(tmp_path: Path) -> None:
    """So that the message of a bad row in it leads there; every rank gets as many tables."""
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"row": range(11)}), file, row_group_size=3)
    for size in (1, 2, 3):
        seen, counts = [], set()
        for rank in range(size):
            _, tables = read_rows(file, replace(ALONE, rank=rank, size=size), 2)
            given = list(tables)
            counts.add(len(given))
            for place, table in given:
                assert table.num_rows <= 2
                if table.num_rows:
                    assert place == f"{file}, rows from {table['row'][0].as_py()}"
                seen += table["row"].to_pylist()
        assert seen == list(range(11)) and len(counts) == 1


@pytest.mark.parametrize("fields", [{"hold_out": 1}, {"k": 3, "user": "users.parquet"}])
def test_a_request_with_a_field_that_is_none(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"^(hold_out|user): is no field of a request; fields: k, holdout, users"):
        Request.of(**fields)
