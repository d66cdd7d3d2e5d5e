"""Vocabularies: values to ids and back, and files that are not what schema.json says."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gr.data.vocabulary import Vocabulary, check_vocabularies
from gr.errors import DataError
from gr.schema import DataSchema
from tests.support.own_log import LOG, TIMED, prepared

TEXT = Vocabulary("shop", np.array([2, 5, 9]), pa.array(["", "7", "é"]))
NUMBERS = Vocabulary("shop", np.array([2, 5, 9]), pa.array([-3, 7, 1 << 62]))
ITSELF = Vocabulary("shop")
NONE = Vocabulary("shop", np.array([], dtype=np.int64), pa.array([], pa.string()))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.string_view()]
)
def test_text(kind: pa.DataType) -> None:
    values = pa.array(["é", "", None, "x", "7", "é"]).cast(kind)
    for each in (values, pa.chunked_array([values[:2], values[2:]]), pa.chunked_array([values]).slice(0, 6)):
        assert TEXT.ids(each).tolist() == [9, 2, 0, 0, 5, 9]
    assert TEXT.lookup(values)[1].tolist() == [True, True, False, False, True, True]
    assert TEXT.values(np.array([9, 2, 0, 3, 100])).to_pylist() == ["é", "", None, None, None]


@pytest.mark.parametrize("kind", [pa.int64(), pa.int8(), pa.float64(), pa.string()])
def test_numbers(kind: pa.DataType) -> None:
    assert NUMBERS.ids(pa.array([7, None, 4, -3]).cast(kind)).tolist() == [5, 0, 0, 2]
    assert NUMBERS.ids(pa.array([1 << 62, 7]).dictionary_encode()).tolist() == [9, 5]


def test_ids_that_stand_for_themselves() -> None:
    ids, known = ITSELF.lookup(pa.array([0, 4, None], pa.int32()))
    assert ids.tolist() == [0, 4, 0] and known.tolist() == [True, True, False]
    assert ITSELF.values(np.array([0, 4])).to_pylist() == [0, 4] and ITSELF.type == pa.int64()


def test_none_at_all() -> None:
    assert NONE.ids(pa.array(["a", None])).tolist() == [0, 0] and NONE.ids(pa.array([], pa.string())).tolist() == []
    assert TEXT.ids(pa.array([])).tolist() == [] and NUMBERS.ids(pa.array([None, None])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("vocabulary", "values", "fault"),
    [
        (TEXT, [7], "shop: values of type int64 cannot be looked up, these are text"),
        (TEXT, [[1]], "cannot be looked up, these are text"),
        (NUMBERS, ["a"], "shop: values of type string cannot be looked up, these are whole numbers"),
        (NUMBERS, [1.5], "these are whole numbers"),
        (ITSELF, [b"a"], "these are whole numbers"),
        (ITSELF, [float("nan")], "these are whole numbers"),
    ],
)
def test_values_of_another_kind(vocabulary: Vocabulary, values: list[Any], fault: str) -> None:
    with pytest.raises(DataError) as error:
        vocabulary.ids(pa.array(values))
    assert fault in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_damaged(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "o", LOG, **TIMED)
    schema = DataSchema.load(folder)
    assert Vocabulary.open(folder, schema, "item_id").ids(pa.array(["x2", "x9"])).tolist() == [2, 0]
    assert Vocabulary.open(folder, schema, "none").values_V is None
    path = folder / "vocabulary" / "item_id.parquet"
    content = path.read_bytes()
    for damaged in (b"", content[:-1], content[:40] + bytes([content[40] ^ 1]) + content[41:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"item_id.parquet: is not the file that schema.json names \(SHA-256\)"):
            Vocabulary.open(folder, schema, "item_id")
    path.unlink()
    with pytest.raises(DataError, match=r"item_id.parquet: the file has gone"):
        Vocabulary.open(folder, schema, "item_id")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", ".hidden", "a\\b", "a\nb", "", "x" * 201])
def test_a_name_that_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = prepared(tmp_path / "o", LOG, **TIMED)
    schema = DataSchema.load(folder)
    schema.model_copy(update={"vocabularies": {**schema.vocabularies, name: "0" * 64}}).save(folder)
    with pytest.raises(DataError, match=r"schema.json: field vocabularies") as error:
        DataSchema.load(folder)
    assert "\n" not in str(error.value)


def test_folders_whose_ids_stand_for_other_values() -> None:
    check_vocabularies({"a": "1"}, Path("x"), {"a": "1"}, Path("y"))
    for mine, others in (({"a": "1"}, {"a": "2"}), ({"a": "1"}, {}), ({}, {"a": "1"})):
        with pytest.raises(
            DataError, match=r"^x and y have other vocabularies of a: prepare y with `gr prepare events"
        ):
            check_vocabularies(mine, Path("x"), others, Path("y"))
