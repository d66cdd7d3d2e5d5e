"""Schemas of data that no file holds."""

from collections.abc import Sequence

from gr.schema import DataSchema, DenseTransform, HistoryColumns, SourceRows, SparseColumn, TabularSchema


def item_schema(rows: int) -> DataSchema:
    """Histories of `rows` - 1 items and nothing else; row 0 is padding."""
    return DataSchema(
        format_version=1,
        name="items",
        item_cardinality=rows,
        order="none",
        users=1,
        events=0,
        items=max(rows - 1, 1),
        source="tests",
        **HistoryColumns().model_dump(),
    )


def tabular_schema(columns: Sequence[SparseColumn], dense: Sequence[str]) -> TabularSchema:
    """Rows of these features."""
    return TabularSchema(
        format_version=1,
        kind="tabular",
        name="rows",
        labels=["label"],
        dense=list(dense),
        transform=DenseTransform(name="log1p_clip", version=1),
        sparse=list(columns),
        rows=1,
        threshold=1,
        files=[SourceRows(name="none", rows=1, minimum=0)],
        source="tests",
    )
