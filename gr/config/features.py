"""The columns of the data that a model reads, and the tables of those of ids. No torch."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from gr.config.base import Count, Fraction, PositiveFloat, Section
from gr.config.optim import TABLE_OPTIMIZERS, TableOptimizerConfig
from gr.errors import ConfigError, nearest
from gr.schema import DataSchema, TabularSchema

ITEM_TABLE = "item_id"
TableDtype = Literal["fp32", "fp16"]
ComputeKernel = Literal["fused", "fused_uvm", "fused_uvm_caching", "auto"]
Rounding = Literal["stochastic", "nearest"]


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"names {repeated[0]} twice")
    return names


Features = Annotated[tuple[str, ...], AfterValidator(_distinct)]


class _Ids(Section):
    def layout(self) -> dict[str, Any]:
        """The values on which the rows of a checkpoint depend, without the ways of dynamic sets, which may grow."""
        return dict(self)


class DenseIds(_Ids):
    """Ids are rows, as `gr prepare` numbers them."""

    kind: Literal["dense"] = "dense"


class HashedIds(_Ids):
    """Any ids from 0 to 2^63 - 2: a row is a hash of the id (splitmix64), which others share."""

    kind: Literal["hashed"] = "hashed"
    rows: Count = Field(description="Rows of the table.")


# In a checkpoint the map of a table's dynamic ids is saved beside the table, under its name and this.
ID_MAP = "/ids"


class DynamicIds(_Ids):
    """Any ids from 0 to 2^63 - 2: training gives each a row of its own, and takes it back for others.

    Rows are sets of `ways`; an id's set is a hash of it, and the ids of a set that have no row share its first one.
    """

    kind: Literal["dynamic"] = "dynamic"
    rows: Count = Field(description="Rows of the table, a multiple of ways.")
    ways: Annotated[int, Field(ge=2, le=4096)] = Field(
        64, description="Rows that an id may have: more of them evict more nearly the weakest id of the whole table."
    )
    eviction: Literal["lru", "lfu"] = Field(
        "lru", description="Who gives way: lru, the id used longest ago; lfu, that of the fewest uses, which decay."
    )
    half_life: PositiveFloat = Field(
        1000.0, description="Steps after which a use counts half, under lfu and for min_count."
    )
    min_count: Annotated[int, Field(ge=1, le=255)] = Field(
        1, description="Uses after which an id may have a row; above 1 they are estimated, in 4 bytes a row."
    )

    @property
    def sets(self) -> int:
        return self.rows // self.ways

    def layout(self) -> dict[str, Any]:
        return {"kind": self.kind, "sets": self.sets, "eviction": self.eviction, "counts": self.min_count > 1}

    @model_validator(mode="after")
    def _whole_sets(self):
        if self.rows % self.ways:
            nearest_rows = max(1, round(self.rows / self.ways)) * self.ways
            raise ValueError(f"rows={self.rows} is no multiple of ways={self.ways}: set rows={nearest_rows}")
        return self


TableIds = Annotated[DenseIds | HashedIds | DynamicIds, Field(discriminator="kind")]


class TableOptions(Section):
    """The table of one column, where it is not as all others are."""

    table: str | None = Field(
        None, description="Column whose table this one reads, too: their ids must stand for the same values."
    )
    ids: TableIds | None = Field(None, description="What the column's ids are; unset: dense, rows of the table.")
    dtype: TableDtype | None = Field(None, description="Of this table's rows in memory; unset: embeddings.dtype.")
    rounding: Rounding | None = Field(None, description="Of updates to fp16 rows; unset: embeddings.rounding.")
    optimizer: Annotated[TableOptimizerConfig, TABLE_OPTIMIZERS] | None = Field(
        None, description="Updates this table's rows; unset: embeddings.optimizer."
    )
    compute_kernel: ComputeKernel | None = Field(
        None, description="Home of this table's rows; unset: embeddings.compute_kernel."
    )
    cache_load_factor: Fraction | None = Field(
        None, description="Share of this table's rows in HBM; unset: embeddings.cache_load_factor."
    )

    @model_validator(mode="after")
    def _the_owner_decides(self):
        own = [name for name, value in self if name != "table" and value is not None]
        if self.table is not None and own:
            raise ValueError(f"table={self.table} shares a table: set {', '.join(own)} of {self.table} instead")
        return self


def chosen_features(schema: DataSchema, features: Collection[str] | None) -> DataSchema:
    """Histories with these features beside the item, in the order of schema.json; None: with all.

    Raises ConfigError where there is no such feature.
    """
    if features is None:
        return schema
    known = [ITEM_TABLE, *schema.event_features, *schema.contextual, *schema.contextual_numeric]
    _check_columns("model.features", features, known, f"{schema.name} (schema.json)")
    return schema.model_copy(
        update={
            "event_features": {name: rows for name, rows in schema.event_features.items() if name in features},
            "contextual": {name: rows for name, rows in schema.contextual.items() if name in features},
            "contextual_numeric": [name for name in schema.contextual_numeric if name in features],
        }
    )


def chosen_item_features(schema: DataSchema, features: Collection[str]) -> DataSchema:
    """Histories with these features of items and no others. Raises ConfigError where there is no such feature."""
    _check_columns("model.features", features, [ITEM_TABLE, *schema.event_features], f"{schema.name} (schema.json)")
    chosen = {name: rows for name, rows in schema.event_features.items() if name in features}
    return schema.model_copy(update={"event_features": chosen, "contextual": {}, "contextual_numeric": []})


def chosen_columns(schema: TabularSchema, features: Collection[str] | None) -> TabularSchema:
    """Rows of these dense and sparse columns, in the order of schema.json; None: of all.

    Raises ConfigError where there is no such column, or where none of a kind is left.
    """
    if features is None:
        return schema
    known = [*schema.dense, *(column.name for column in schema.sparse)]
    _check_columns("model.features", features, known, f"{schema.name} (schema.json)")
    dense = [name for name in schema.dense if name in features]
    sparse = [column for column in schema.sparse if column.name in features]
    for kind, chosen, there in (("dense", dense, schema.dense), ("sparse", sparse, [c.name for c in schema.sparse])):
        if not chosen and there:
            raise ConfigError(f"model.features has no {kind} column, DLRM needs one: name one of {', '.join(there)}")
    return schema.model_copy(
        update={
            "dense": dense,
            "sparse": sparse,
            "vocabularies": {name: digest for name, digest in schema.vocabularies.items() if name in features},
        }
    )


def columns_by_table(rows: Mapping[str, int], options: Mapping[str, TableOptions]) -> dict[str, tuple[str, ...]]:
    """The columns that read each table, by the table's name, which is that of the first of them.

    rows: of each column of ids that the model reads. Raises ConfigError where `options` names another column, or one
    with other ids than those of the column whose table it shares.
    """
    _check_columns("embeddings.tables", options, rows, "the model")
    owners = {name: own.table for name, own in options.items() if own.table is not None}
    for name, owner in owners.items():
        key = f"embeddings.tables.{name}.table"
        _check_columns(key, [owner], rows, "the model")
        if owner == name or owner in owners:
            raise ConfigError(f"{key}={owner}: name a column that has a table of its own, or unset it")
        if rows[owner] != rows[name]:
            raise ConfigError(
                f"{key}={owner}: {owner} has {rows[owner]} ids and {name} {rows[name]}; columns that share a table "
                "have the same ids"
            )
    return {
        table: (table, *(name for name in rows if owners.get(name) == table)) for table in rows if table not in owners
    }


def _check_columns(key: str, names: Iterable[str], known: Collection[str], whose: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{key}: {whose} has no feature {name}; {nearest(name, known, 'it has')}")
