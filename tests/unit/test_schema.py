"""schema.json: round trip, and errors that name file and field."""

import json
from pathlib import Path

import pytest

from gr.errors import DataError
from gr.schema import DataSchema

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
    ("text", "expected"), [("{,", "line 1, column 2"), ("[]", "must be a JSON object"), (b"\xff", "not UTF-8")]
)
def test_not_a_schema(tmp_path: Path, text: str | bytes, expected: str) -> None:
    (tmp_path / "schema.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=expected):
        DataSchema.load(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"schema\.json: cannot be read"):
        DataSchema.load(tmp_path)
