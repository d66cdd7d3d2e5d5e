"""The configuration of `gr export`: which numbers a package keeps of a checkpoint. No torch."""

from collections.abc import Collection, Sequence
from typing import Literal, get_args

from pydantic import Field, NonNegativeInt, model_validator

from gr.config.base import Count, CountOrNone, PathText, PositiveFloat, Section
from gr.errors import ConfigError, nearest

RowKind = Literal["fp32", "fp16", "int8", "int4", "int2"]
DenseDtype = Literal["fp32", "bf16"]
CacheDtype = Literal["fp32", "bf16", "int8"]
Kind = RowKind | DenseDtype  # of a table's rows, or of the products of a dense layer
UnknownPolicy = Literal["zero", "reject"]


class ExportTables(Section):
    dtype: RowKind | Literal["auto"] = Field(
        "auto",
        description="Of the rows of every table; int8 to int2 have an fp16 scale and bias. auto: table by table, the "
        "fewest bytes with which the accuracy gate passes.",
    )
    own: dict[str, RowKind] = Field({}, description="By table: another type than dtype.")


class GateConfig(Section):
    """The largest differences allowed between a package and its checkpoint, on rows that were not trained on."""

    data: PathText | None = Field(None, description="Folder of these rows; unset: evaluation.path of the checkpoint.")
    rows: CountOrNone = Field(200_000, description="Rows that are measured, at most; 0: nothing is measured.")
    max_ne_increase: PositiveFloat = Field(
        0.0005, description="Relative change of NE that is allowed, up or down; other bounds follow from it."
    )


class ExportIndex(Section):
    """How a retrieval model's items are searched."""

    kind: Literal["exact", "approximate"] = Field("exact", description="approximate: an inverted file (extra faiss).")
    recall: float = Field(0.97, gt=0, le=1, description="Of the exact k best, that an approximate index must find.")
    k: int = Field(100, ge=1, description="Items a query at which the recall is measured.")


class ExportConfig(Section):
    """Options of `gr export`; each value may be given on its command line, as tables.dtype=int8."""

    tables: ExportTables = Field(ExportTables(), description="The rows of the embedding tables.")
    gate: GateConfig = Field(GateConfig(), description="The accuracy that is asked for.")
    dense: DenseDtype | Literal["auto"] = Field(
        "fp32",
        description="Of the matrices outside the tables, and of their products. auto: layer by layer, bf16 but for "
        "those with which the accuracy gate would not pass.",
    )
    unknown: UnknownPolicy = Field(
        "zero",
        description="A value that training did not see: zero takes the row of unknown values, reject refuses the "
        "request. Both are counted.",
    )
    index: ExportIndex = Field(ExportIndex(), description="The index of a retrieval model's items.")
    cache: CacheDtype = Field(
        "fp32",
        description="Of a ranking model's cached keys and values; bf16 holds twice as many users, int8 nearly four.",
    )
    cache_mib: NonNegativeInt = Field(
        1024,
        description="MiB for keys and values that a server keeps of users between requests, where the model's form "
        "allows; the least recently used leave first.",
    )
    cards: int = Field(
        0,
        ge=0,
        le=256,
        description="Of a click model: processes that share its tables, each with a core of its own; 0: the tables are "
        "in the process that answers.",
    )
    card_bytes: Count | None = Field(None, description="Of tables that a card has room for; unset: no bound.")
    keep: int = Field(2, ge=0, le=100, description="Earlier versions that are kept beside the one that is served.")

    @model_validator(mode="after")
    def _auto_needs_rows(self):
        for key, dtype in (("tables.dtype", self.tables.dtype), ("dense", self.dense)):
            if dtype == "auto" and not self.gate.rows:
                raise ValueError(
                    f"{key}=auto is chosen by the accuracy gate, and gate.rows=0 turns it off: name a type"
                )
        return self

    @model_validator(mode="after")
    def _bytes_are_of_cards(self):
        if self.card_bytes is not None and not self.cards:
            raise ValueError("card_bytes is the room of a card, and cards=0 means none: set cards, or leave it out")
        return self

    def options(self, tables: Collection[str], layers: Collection[str]) -> dict[str, Sequence[Kind]]:
        """The types that each table and dense layer may have, those of the most bytes first.

        Raises ConfigError where tables.own names another table.
        """
        for name in self.tables.own:
            if name not in tables:
                raise ConfigError(f"tables.own: the model has no table {name}; {nearest(name, tables, 'it has')}")
        rows: Sequence[RowKind] = get_args(RowKind) if self.tables.dtype == "auto" else (self.tables.dtype,)
        dense: Sequence[DenseDtype] = get_args(DenseDtype) if self.dense == "auto" else (self.dense,)
        by_table = {name: (self.tables.own[name],) if name in self.tables.own else rows for name in tables}
        return {**by_table, **dict.fromkeys(layers, dense)}


def load_export_config(overrides: Sequence[str]) -> ExportConfig:
    """The configuration of a command line. Raises ConfigError with every fault."""
    # Not needed by who reads the configuration of a package that is there.
    from gr.config.load import load_section
    from gr.config.yaml import Node

    return load_section(ExportConfig, "gr export", overrides, given=Node({}, "gr export"))
