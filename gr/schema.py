"""schema.json: what a data folder holds.

A data folder is

    schema.json          this file's `DataSchema`
    part-00000.parquet   one row a user, in row groups: user_id int64, item_ids list<int32|int64> oldest first,
                         optional timestamps list<int64> (seconds), optional ratings list<float32>,
                         one integer column for each contextual feature
    items.parquet        the corpus of candidates, ids ascending: item_id, count (occurrences over all users, without
                         each user's newest two events)
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from gr.errors import DataError

FORMAT_VERSION = 1
SCHEMA_FILE = "schema.json"
ITEMS_FILE = "items.parquet"
PART_PATTERN = "part-*.parquet"


class DataSchema(BaseModel):
    """Description of one data folder. Item ids are embedding table rows as they are; id 0 is padding, never used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = Field(description="Layout of the folder; this is the only one so far.")
    name: str = Field(description="Name of the data set, for reports.")
    item_feature: Literal["item_id"] = Field("item_id", description="Model feature of the items.")
    item_column: Literal["item_ids"] = Field("item_ids", description="Parquet column of the items.")
    item_cardinality: Annotated[int, Field(ge=2)] = Field(description="Largest item id + 1: rows of the item table.")
    timestamps: bool = Field(description="Whether the column timestamps (seconds) exists.")
    ratings: bool = Field(description="Whether the column ratings exists.")
    contextual: dict[str, PositiveInt] = Field({}, description="Contextual columns and their cardinalities.")
    order: str = Field(description="How events of a user are ordered, and the rule for ties.")
    users: PositiveInt = Field(description="Rows over all parts.")
    events: NonNegativeInt = Field(description="Events over all users.")
    items: PositiveInt = Field(description="Rows of items.parquet: candidates, including items without an event.")
    source: str = Field(description="Where the data came from.")

    @classmethod
    def load(cls, folder: Path | str) -> "DataSchema":
        """Read folder/schema.json. DataError names the file and, for a wrong or missing field, the field."""
        path = Path(folder) / SCHEMA_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); write a data folder with `gr prepare`"
            ) from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
        if not isinstance(fields, dict):
            raise DataError(f"{path}: must be a JSON object, is a {type(fields).__name__}")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            faults = "; ".join(
                f"field {'.'.join(map(str, fault['loc']))}: {fault['msg']}"
                + ("" if fault["type"] == "missing" else f", got {fault['input']!r}")
                for fault in error.errors()
            )
            raise DataError(f"{path}: {faults}") from None

    def save(self, folder: Path | str) -> None:
        """Write folder/schema.json."""
        (Path(folder) / SCHEMA_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
