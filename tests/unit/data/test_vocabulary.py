"""Vocabularies: values to ids and back, and files that are not what schema.json says."""

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data.vocabulary import Vocabulary, check_vocabularies
from gr.errors import DataError
from gr.schema import DataSchema
from tests.support.own_log import LOG, TIMED, prepared, refusal

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
    without_gaps = Vocabulary("shop", np.array([2, 3, 4]), pa.array(["", "7", "é"]))
    assert without_gaps.values(np.array([4, 2, 0, 3, 100, 5, 1])).to_pylist() == ["é", "", None, "7", None, None, None]


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
    assert NONE.values(np.array([1, 2])).to_pylist() == [None, None]
    assert TEXT.ids(pa.array([])).tolist() == [] and NUMBERS.ids(pa.array([None, None])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("vocabulary", "values", "fault"),
    [
        (TEXT, [7], "shop: values of type int64 cannot be looked up, these are text"),
        (TEXT, [[1]], "cannot be looked up, these are text"),
        (NUMBERS, ["a"], "shop: values of type string cannot be looked up, these are whole numbers"),
        (NUMBERS, [1.5], "these are whole numbers"),
        (ITSELF, [b"a"], "these are whole numbers"),
        (NUMBERS, [b"7"], "they are times or bytes"),
        (NUMBERS, [datetime(1970, 1, 1)], "they are times or bytes"),
        (ITSELF, [float("nan")], "these are whole numbers"),
    ],
)
def test_values_of_another_kind(vocabulary: Vocabulary, values: list[Any], fault: str) -> None:
    with pytest.raises(DataError) as error:
        vocabulary.ids(pa.array(values))
    assert fault in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 300])
@pytest.mark.parametrize("text", [False, True])
def test_every_value_of_a_vocabulary_is_found_and_no_other(size: int, text: bool) -> None:
    random = np.random.default_rng(size)
    numbers = np.sort(random.choice(10 * size, size, replace=False))
    # In order of their UTF-8 bytes, which is that of their characters.
    values = sorted({chr(97 + n * 37 % 4000) * (1 + n % 3) for n in numbers.tolist()}) if text else numbers.tolist()
    ids = 3 + 2 * np.arange(len(values))
    expected = dict(zip(values, ids.tolist(), strict=True))
    asked = [*values, *([chr(97 + n) for n in range(200)] if text else range(-2, 10 * size + 2)), None]
    random.shuffle(asked)
    vocabulary = Vocabulary("x", ids, pa.array(values))
    found, known = vocabulary.lookup(pa.array(asked))
    assert found.tolist() == [expected.get(value, 0) for value in asked]
    assert known.tolist() == [value in expected for value in asked]


ODD: dict[str, tuple[pa.Table, str]] = {
    "values in another order": (pa.table({"value": ["b", "a"], "id": [1, 2]}), "its values and its ids must ascend"),
    "a value twice": (pa.table({"value": ["a", "a"], "id": [1, 2]}), "its values and its ids must ascend"),
    "a value that is null": (pa.table({"value": ["a", None], "id": [1, 2]}), "its values and its ids must ascend"),
    "ids in another order": (pa.table({"value": ["a", "b"], "id": [2, 1]}), "its values and its ids must ascend"),
    "an id that is 0": (
        pa.table({"value": ["a", "b"], "id": [0, 1]}),
        "has ids from 0 to 1, schema.json allows 1 to 3",
    ),
    "an id that is large": (pa.table({"value": ["a", "b"], "id": [1, 4]}), "has ids from 1 to 4, schema.json allows 1"),
    "no values": (pa.table({"id": [1, 2]}), "is no vocabulary"),
    "no ids": (pa.table({"value": ["a"]}), "is no vocabulary"),
    "two columns": (pa.table([["a"], ["a"], [1]], names=["value", "value", "id"]), "is no vocabulary"),
    "floats": (pa.table({"value": [0.5], "id": [1]}), "is no vocabulary"),
}


@pytest.mark.parametrize("name", ODD)
def test_files_that_are_none(tmp_path: Path, name: str) -> None:
    """With the sum of that file in schema.json: reading and `gr prepare events --vocabulary` refuse it."""
    folder = prepared(tmp_path / "o", LOG, **TIMED)
    path = folder / "vocabulary" / "item_id.parquet"
    table, fault = ODD[name]
    pq.write_table(table, path)
    schema = DataSchema.load(folder)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    schema.model_copy(update={"vocabularies": {**schema.vocabularies, "item_id": digest}}).save(folder)
    with pytest.raises(DataError) as error:
        Vocabulary.open(folder, DataSchema.load(folder), "item_id")
    assert f"item_id.parquet: {fault}" in str(error.value) and "\n" not in str(error.value)
    assert f"item_id.parquet: {fault}" in refusal(tmp_path, LOG, **TIMED, vocabulary=folder)


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
