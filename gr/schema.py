"""The file schema.json, which describes a data folder.

A folder of user histories is

    schema.json          this file's `DataSchema`
    part-00000.parquet   one row a user, in row groups: user_id int64, item_ids list<int32|int64> oldest first, and,
                         each with one element an event, optional timestamps list<int64>, ratings list<float32>,
                         actions list<int32> (bit k of an element: whether action k was taken), a list<float32> for
                         each of `values`, a list<int32|int64> for each of `event_features`; for each contextual
                         feature one integer column, for each numeric one a float32 column
    items.parquet        the corpus of candidates, ids ascending: item_id, count (occurrences over all users, without
                         each user's newest two events), and each of `event_features` that the item
                         determines, int32|int64
    vocabulary/          of an own log: one Parquet file for item_id, user_id and each feature of categories: value (the
                         log's own id: int64 or text) and id, both ascending, and count (occurrences in training)

A tabular folder is

    schema.json          this file's `TabularSchema`
    part-00000.parquet   one row an example, in row groups: the label int8|float32, dense columns float32, sparse
                         columns int32 (list<int32> of exactly `hots` ids where hots > 1); id 0: missing, rare or unseen
    vocabulary/          of raw data: one Parquet file a sparse column, c1.parquet: value (uint32: hexadecimal digits,
                         int64: whole numbers, or text) ascending, id int32 from 1, count (occurrences in the source)
"""

from collections import Counter
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gr.errors import DataError
from gr.files import read_json

FORMAT_VERSION = 1
SCHEMA_FILE = "schema.json"
TOKENIZER_FILE = "tokenizer.json"
ITEMS_FILE = "items.parquet"
PART_PATTERN = "part-*.parquet"
VOCABULARY_FOLDER = "vocabulary"
UNCOUNTED_EVENTS = 2  # newest events of each user, which are evaluated on, so that items.parquet does not count them
# A cardinality above it says that ids are raw, and are given rows while a model is trained: nothing is as long.
LARGEST_DENSE = 1 << 40
RAW_IDS = (1 << 63) - 1  # the cardinality of a column of any ids from 0 to 2^63 - 2
# Ids and counts are int64 in every file and tensor.
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
NonNegativeInt = Annotated[Int64, Field(ge=0)]
PositiveInt = Annotated[Int64, Field(ge=1)]


def vocabulary_file(column: str) -> str:
    """The path of a column's vocabulary in a data folder and in a checkpoint."""
    return f"{VOCABULARY_FOLDER}/{column}.parquet"


class _SchemaFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    _kind: ClassVar[str] = "histories"  # the kind of folder that a file without the field `kind` describes

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Reads folder/schema.json. Raises DataError, which names the file and any field that is wrong or missing."""
        path = Path(folder) / SCHEMA_FILE
        if not path.parent.is_dir():
            raise DataError(
                f"{folder}: no such folder; `gr prepare ... --out {folder}` writes one, of your own log with "
                "`gr prepare events`"
            )
        if not path.exists() and (inside := sorted(each.parent.name for each in path.parent.glob(f"*/{SCHEMA_FILE}"))):
            shown = ", ".join(inside[:10]) + (f" and {len(inside) - 10} more" if len(inside) > 10 else "")
            raise DataError(f"{folder}: is no data folder, but has {shown}: name one of them")
        fields = read_json(path, DataError, "`gr prepare` writes it, of your own log with `gr prepare events`")
        if (kind := fields.get("kind", "histories")) != cls._kind:
            raise DataError(f"{path}: describes a {kind} folder, this reads {cls._kind} folders; choose another folder")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            faults = "; ".join(
                f"field {'.'.join(map(str, fault['loc'])) or 'names'}: {fault['msg']}"
                + ("" if fault["type"] == "missing" else f", got {fault['input']!r:.60}")
                for fault in error.errors()
            )
            raise DataError(f"{path}: {' '.join(faults.splitlines())}") from None

    def save(self, folder: Path | str) -> None:
        """Writes folder/schema.json."""
        (Path(folder) / SCHEMA_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


USER_COLUMN = "user_id"
MAX_ACTIONS = 31
FileName = Annotated[str, Field(pattern=r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*$", max_length=200)]
# A table is a submodule of its column's name, which may be none of torch.nn.ModuleDict's own, nor have a dot.
_NAMES = """
T_destination add_module apply bfloat16 buffers call_super_init children clear compile cpu cuda double dump_patches
eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu items keys
load_state_dict modules mtia named_buffers named_children named_modules named_parameters parameters pop
register_backward_hook register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state
set_submodule share_memory state_dict to to_empty train training type update values xpu zero_grad
"""
NAMES_OF_TORCH = frozenset(_NAMES.split())
_VOCABULARIES = "Columns whose ids stand for values of vocabulary/<column>.parquet: SHA-256 of that file."
# Columns of a folder of histories, and item_id: the model's feature, its vocabulary, and the column of items.parquet.
HISTORY_COLUMNS = ("user_id", "item_id", "item_ids", "timestamps", "ratings", "actions")


class HistoryColumns(BaseModel):
    """Columns of a folder of user histories beside users and items. Id 0 of a feature means missing or unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timestamps: bool = Field(False, description="Whether the column timestamps exists.")
    time_unit: Literal["s", "ms"] = Field("s", description="Unit of timestamps.")
    ratings: bool = Field(False, description="Whether the column ratings exists.")
    actions: list[str] = Field([], max_length=MAX_ACTIONS, description="Names of the bits of the column actions.")
    values: list[str] = Field([], description="Further columns of numbers, one an event.")
    event_features: dict[str, PositiveInt] = Field({}, description="Columns of ids, one an event: cardinalities.")
    contextual: dict[str, PositiveInt] = Field({}, description="Columns of ids, one a user: cardinalities.")
    contextual_numeric: list[str] = Field([], description="Columns of numbers, one a user.")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        _require_distinct(self.actions, "action")
        named = [*self.values, *self.event_features, *self.contextual, *self.contextual_numeric]
        _require_distinct([*HISTORY_COLUMNS, *named], "column")
        return self

    @property
    def user_columns(self) -> list[str]:
        """Columns with one element a user."""
        return [*self.contextual, *self.contextual_numeric]

    @property
    def event_columns(self) -> list[str]:
        """Columns with one element an event, item_ids first."""
        optional = [("timestamps", self.timestamps), ("ratings", self.ratings), ("actions", bool(self.actions))]
        return ["item_ids", *(name for name, exists in optional if exists), *self.values, *self.event_features]


class DataSchema(HistoryColumns, _SchemaFile):
    """The description of a folder of user histories. Item ids are rows of the item table; id 0 is padding."""

    format_version: Literal[1] = Field(description="Layout of the folder; this is the only one so far.")
    name: str = Field(description="Name of the data set, for reports.")
    item_feature: Literal["item_id"] = Field("item_id", description="Model feature of the items.")
    item_column: Literal["item_ids"] = Field("item_ids", description="Parquet column of the items.")
    item_cardinality: Annotated[Int64, Field(ge=2)] = Field(
        description="Largest item id + 1: rows of the item table, unless a model gives raw ids rows of their own."
    )
    timestamps: bool = Field(description="Whether the column timestamps exists.")
    ratings: bool = Field(description="Whether the column ratings exists.")
    order: str = Field(description="How events of a user are ordered, and the rule for ties.")
    users: PositiveInt = Field(description="Rows over all parts.")
    events: NonNegativeInt = Field(description="Events over all users.")
    items: PositiveInt = Field(description="Rows of items.parquet: candidates, including items without an event.")
    vocabularies: dict[FileName, str] = Field({}, description=_VOCABULARIES)
    source: str = Field(description="Where the data came from.")

    @property
    def cardinalities(self) -> dict[str, int]:
        """Largest id + 1 of each column of ids that a model may read."""
        return {self.item_feature: self.item_cardinality, **self.event_features, **self.contextual}

    @property
    def input_vocabularies(self) -> dict[str, str]:
        """The digests of the vocabularies of what a model reads."""
        read = self.cardinalities
        return {name: digest for name, digest in self.vocabularies.items() if name in read}

    def summary(self) -> str:
        """The sizes, in one line."""
        return f"{self.users:,} users, {self.events:,} events, {self.items:,} items"


class DenseTransform(BaseModel):
    """The formula that made dense features of counts. A version keeps its meaning: a changed formula gets a new one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["log1p_clip", "torchrec_minshift", "none"] = Field(
        description="none: numbers as they were. log1p_clip: log(max(x, 0) + 1). torchrec_minshift: log(x - m + 2), m "
        "the least count of the source file over all dense columns. A missing count is x = 0 in both, and in m."
    )
    version: Literal[1] = Field(description="Version of that formula.")


class SparseColumn(BaseModel):
    """A column of ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Parquet column and feature of the model.")
    cardinality: PositiveInt = Field(
        description="Largest id + 1: rows of the table, unless a model gives raw ids rows of their own."
    )
    hots: PositiveInt = Field(1, description="Ids of each row; more than 1 makes the column a list.")


class SourceRows(BaseModel):
    """The rows that came from one file of the source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Name of the file.")
    rows: NonNegativeInt = Field(description="Rows written.")
    minimum: Int64 = Field(description="Least count of the file over all dense columns, missing counts as 0.")


class TabularSchema(_SchemaFile):
    """The description of a tabular folder: rows of one label, dense features and ids."""

    _kind: ClassVar[str] = "tabular"

    format_version: Literal[1] = Field(description="Layout of the folder; this is the only one so far.")
    kind: Literal["tabular"] = Field(description="Tells this schema from that of user histories.")
    name: str = Field(description="Name of the data set, for reports.")
    labels: list[str] = Field(min_length=1, max_length=1, description="The label column.")
    dense: list[str] = Field(description="Dense columns, in the order of the model's input.")
    transform: DenseTransform = Field(description="How the dense columns were made.")
    sparse: list[SparseColumn] = Field(description="Sparse columns, in the order of the model's features.")
    rows: PositiveInt = Field(description="Rows over all parts.")
    threshold: PositiveInt = Field(description="Occurrences from which a value is in the vocabulary.")
    max_rows: Annotated[Int64, Field(ge=2)] | None = Field(
        None,
        description="Rows of a table at most: entry k of a vocabulary, from 1, has id 1 + (k - 1) % (max_rows - 1).",
    )
    files: list[SourceRows] = Field(description="Files of the source, in the order of their rows.")
    bad_rows: dict[str, PositiveInt] = Field({}, description="Rows left out, by what was wrong with them.")
    vocabularies: dict[FileName, str] = Field({}, description=_VOCABULARIES)
    negative_counts: dict[str, PositiveInt] = Field({}, description="Counts below 0 of each dense column.")
    source: str = Field(description="Where the data came from.")

    @property
    def cardinalities(self) -> dict[str, int]:
        """Largest id + 1 of each column of ids."""
        return {column.name: column.cardinality for column in self.sparse}

    @property
    def input_vocabularies(self) -> dict[str, str]:
        """The digests of the vocabularies of what a model reads."""
        read = self.cardinalities
        return {name: digest for name, digest in self.vocabularies.items() if name in read}

    def summary(self) -> str:
        """The sizes, in one line."""
        dense = [column.cardinality for column in self.sparse if column.cardinality <= LARGEST_DENSE]
        ids = f"{sum(dense):,} ids in {len(dense)} columns"
        raw = f", raw ids in {len(self.sparse) - len(dense)}" if len(dense) < len(self.sparse) else ""
        return f"{self.rows:,} rows, {len(self.dense)} dense columns, {ids}{raw}"

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        _require_distinct([*self.labels, *self.dense, *(column.name for column in self.sparse)], "column")
        return self


class TextSchema(_SchemaFile):
    """The description of a text folder: documents of token ids."""

    _kind: ClassVar[str] = "text"

    format_version: Literal[1] = Field(description="Layout of the folder; this is the only one so far.")
    kind: Literal["text"] = Field(description="Tells this schema from that of user histories.")
    name: str = Field(description="Name of the data set, for reports.")
    vocabulary: PositiveInt = Field(description="Largest token id + 1.")
    documents: NonNegativeInt = Field(description="Rows over all parts.")
    tokens: NonNegativeInt = Field(description="Token ids over all parts.")
    prompts: bool = Field(False, description="Whether the column prompt_length exists.")
    bos: Int64 | None = Field(None, description="The id that begins a document.")
    eos: Int64 | None = Field(None, description="The id that ends a document.")
    tokenizer: str | None = Field(None, description="SHA-256 of tokenizer.json, which made the tokens.")
    source: str = Field(description="Where the data came from.")

    @property
    def input_vocabularies(self) -> dict[str, str]:
        """None: ids of tokens stand for what tokenizer.json says."""
        return {}

    def summary(self) -> str:
        """The sizes, in one line."""
        return f"{self.documents:,} documents, {self.tokens:,} tokens of {self.vocabulary:,} ids"


def _require_distinct(names: list[str], noun: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{noun} {repeated[0]} is named twice")
