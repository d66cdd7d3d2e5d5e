"""schema.json: round trip, and errors that name file and field."""

import json
from pathlib import Path

import pytest

from gr.errors import DataError
from gr.schema import DataSchema, TabularSchema

FIELDS = {
    "format_version": 1,
    "name": "tiny",
    "item_cardinality": 10,
    "timestamps": False,
    "ratings": False,
    "order": "as given",
    "users": 2,
    "events": 5,
    "items": 9,
    "source": "a test",
}


def test_round_trip(tmp_path: Path) -> None:
    schema = DataSchema(**FIELDS, contextual={"age": 7})
    schema.save(tmp_path)
    assert DataSchema.load(tmp_path) == schema


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"users": None}, "users"),
        ({"users": 0}, "users"),
        ({"format_version": 2}, "format_version"),
        ({"colour": "red"}, "colour"),
        ({"contextual": {"age": 0}}, "contextual.age"),
        ({"contextual": {"age": 2**63}}, "contextual.age"),
        ({"item_cardinality": 2**63}, "item_cardinality: Input should be less than 9223372036854775808"),
        ({"event_features": {"age": 2**63}}, "event_features.age"),
        ({"events": 2**63}, "events"),
        ({"items": 10**30}, "items"),
    ],
)
def test_wrong_field_is_named(tmp_path: Path, change: dict, expected: str) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(FIELDS | change))
    with pytest.raises(DataError, match=rf"schema\.json: field {expected}"):
        DataSchema.load(tmp_path)


@pytest.mark.parametrize("missing", ["format_version", "item_cardinality", "order"])
def test_missing_field_is_named(tmp_path: Path, missing: str) -> None:
    (tmp_path / "schema.json").write_text(json.dumps({k: v for k, v in FIELDS.items() if k != missing}))
    with pytest.raises(DataError, match=rf"schema\.json: field {missing}: Field required"):
        DataSchema.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{,", "line 1 is not JSON"),
        ("[]", "holds no JSON object"),
        (b"\xff", "not UTF-8"),
        ("[" * 3000 + "]" * 3000, "nested too deep"),
        ('{"users": ' + "9" * 5000 + "}", "Exceeds the limit"),
    ],
)
def test_not_a_schema(tmp_path: Path, text: str | bytes, expected: str) -> None:
    (tmp_path / "schema.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=expected):
        DataSchema.load(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"schema\.json: cannot be read"):
        DataSchema.load(tmp_path)


TABULAR = {
    "format_version": 1,
    "kind": "tabular",
    "name": "tiny",
    "labels": ["label"],
    "dense": ["i1"],
    "transform": {"name": "log1p_clip", "version": 1},
    "sparse": [{"name": "c1", "cardinality": 10}],
    "rows": 2,
    "threshold": 1,
    "files": [{"name": "train.txt", "rows": 2, "minimum": -1}],
    "source": "a test",
}


def test_tabular_round_trip(tmp_path: Path) -> None:
    schema = TabularSchema.model_validate(TABULAR | {"bad_rows": {"label": 3}})
    schema.save(tmp_path)
    assert TabularSchema.load(tmp_path) == schema and schema.sparse[0].hots == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": ["a", "b"]}, "field labels"),
        ({"transform": {"name": "log", "version": 1}}, r"field transform\.name"),
        ({"transform": {"name": "log1p_clip", "version": 2}}, r"field transform\.version"),
        ({"sparse": [{"name": "c1", "cardinality": 10, "hots": 0}]}, r"field sparse\.0\.hots"),
        ({"sparse": [{"name": "c1", "cardinality": 2**63}]}, r"field sparse\.0\.cardinality"),
        ({"rows": 2**63}, "field rows"),
        ({"dense": ["c1"]}, "column c1 is named twice"),
        ({"kind": "rows"}, "describes a rows folder, this reads tabular folders"),
        ({"rows": 0}, "field rows"),
    ],
)
def test_wrong_tabular_schema(tmp_path: Path, change: dict, expected: str) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(TABULAR | change))
    with pytest.raises(DataError, match=rf"schema\.json: .*{expected}"):
        TabularSchema.load(tmp_path)


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(FIELDS))
    with pytest.raises(DataError, match="describes a histories folder, this reads tabular folders"):
        TabularSchema.load(tmp_path)


def test_a_folder_of_splits_is_no_data_folder(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "schema.json").write_text("{}")
    with pytest.raises(DataError, match="is no data folder, but has test, train: name one of them"):
        DataSchema.load(tmp_path)
