"""The fields of lines: what is parsed is what is written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gr.errors import DataError
from gr.prepare.delimited import MILLISECONDS, SECONDS, Field, Lines, Name, Stars, Whole, require_dense
from gr.prepare.source import SourceFile


def read(folder: Path, text: str, fields: dict[str, Field], header: dict[str, str] | None = None) -> dict[str, Any]:
    (folder / "x.csv").write_text(text)
    return Lines(",", fields, header).read(SourceFile(folder / "x.csv"))


def test_columns_are_found_by_their_names(tmp_path: Path) -> None:
    header = {"user": "userId", "time": "timestamp"}
    fields: dict[str, Field] = {"user": Whole(1, 9), "time": SECONDS}
    columns = read(tmp_path, "timestamp,note,userId\n99999999999,a b,3\n7,0x1,4\n", fields, header)
    assert columns["user"].tolist() == [3, 4] and columns["time"].tolist() == [99999999999, 7]
    with pytest.raises(DataError, match="line 1: column userId is named twice"):
        read(tmp_path, "timestamp,userId,userId\n", fields, header)


@pytest.mark.parametrize(
    ("number", "unit"),
    [(978342450, "s"), (978342450_000, "ms"), (978342450_000_000, "us"), (978342450_000_000_000, "ns")],
)
def test_the_unit_of_a_time_is_seen_by_its_size(tmp_path: Path, number: int, unit: str) -> None:
    for wanted, field in (("s", SECONDS), ("ms", MILLISECONDS)):
        if unit == wanted:
            assert read(tmp_path, f"{number}\n", {"time": field})["time"].tolist() == [number]
        else:
            with pytest.raises(DataError, match="is not a whole number"):
                read(tmp_path, "9" * 5000, {"time": field})
            with pytest.raises(DataError, match=f"line 1, .* a time in {unit}; write it in {wanted} since 1970"):
                read(tmp_path, f"{number}\n", {"time": field})


@pytest.mark.parametrize("text", ["0x5", " 5", "5 ", "+5", "5.0", "5e0", "", "nan", "\u0665", "5\t", "1_0", "9" * 5000])
def test_whole_numbers_are_digits(tmp_path: Path, text: str) -> None:
    for fields in ({"number": Whole(-9, 99)}, {"name": Name(), "number": Whole(-9, 99)}):
        prefix = "a," if "name" in fields else ""
        with pytest.raises(DataError, match=r"line 2, column number: .* is not a whole number"):
            read(tmp_path, f"{prefix}-7\n{prefix}{text}\n{prefix}8\n", fields)


def test_stars_are_exact(tmp_path: Path) -> None:
    columns = read(tmp_path, "5\n0.5\n3.50\n4.0\n", {"rating": Stars(0.5, 0.5)})
    np.testing.assert_array_equal(columns["rating"], np.array([5, 0.5, 3.5, 4], np.float32))
    for text in ("3.3", "5.5", "0", "-1", "1e0", "inf", "04", "4."):
        with pytest.raises(DataError, match=r"allowed are 0.5 to 5 in steps of 0.5"):
            read(tmp_path, f"{text}\n", {"rating": Stars(0.5, 0.5)})


def test_a_name_with_blanks_or_quotes_is_no_other_name(tmp_path: Path) -> None:
    assert read(tmp_path, "#oc-R1\nA0X\n", {"user": Name()})["user"].to_pylist() == ["#oc-R1", "A0X"]
    for text in ("A ", '"A"', "é", "", "A\x01"):
        with pytest.raises(DataError, match=r"line 1, column user: .* is no name"):
            read(tmp_path, f"{text}\nB\n", {"user": Name()})


def test_ids_far_beyond_the_rows() -> None:
    require_dense("x", "id", 1_000_000, 0)
    with pytest.raises(DataError, match=r"x: the largest id is 1000101, .* about 1 rows.*gr prepare events"):
        require_dense("x", "id", 1_000_101, 1)
