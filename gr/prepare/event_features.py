"""Features of users and items from a file of their own: a row for each, by the id that the log has."""

from dataclasses import dataclass, field
from typing import Any

import duckdb
import numpy as np

from gr.errors import DataError
from gr.prepare.event_codes import Codes, Given, by_code, counted, make_codes, value_expression
from gr.prepare.event_log import Column, load_log, one, quoted

_FRACTION = r"-?[0-9]*\.[0-9]+([eE][-+]?[0-9]+)?"


@dataclass(frozen=True)
class Features:
    """by_code: values by the code of a user or item, [U + 1]: ids of categories (int64, 0 unknown) or float32 numbers.

    categories: the codes of each category, by name.
    """

    by_code: dict[str, np.ndarray] = field(default_factory=dict)
    categories: dict[str, Codes] = field(default_factory=dict)

    def sizes(self) -> tuple[dict[str, int], list[str]]:
        """The categories with their cardinalities, and the numbers."""
        categories = {name: codes.count + 1 for name, codes in self.categories.items()}
        return categories, [name for name in self.by_code if name not in categories]

    def vocabularies(self, con: duckdb.DuckDBPyConnection) -> dict[str, str]:
        """Queries of value, id and count of each category."""
        return {
            name: counted(con, codes, np.bincount(self.by_code[name], minlength=codes.count + 1))
            for name, codes in self.categories.items()
        }


def join_features(
    con: duckdb.DuckDBPyConnection,
    key: str,
    codes: Codes,
    source: Any,
    columns: tuple[str, list[str]],
    given: Given | None,
    notes: list[str],
) -> Features:
    """The features of a file, by the codes of `key` (user or item); none without a source.

    columns: that of the ids, and the others. Fractions are numbers, all else is a category. Raises DataError where an
    id occurs twice or none is in the log.
    """
    if source is None:
        return Features()
    table, (column, names) = f"{key}_features", columns
    types = load_log(con, source, {"key": column} | {f"f{i}": name for i, name in enumerate(names)}, table)
    twice = one(con, f"SELECT min(key) FROM (SELECT key FROM {table} GROUP BY key HAVING count(*) > 1)")
    if twice is not None:
        raise DataError(f"--{key}-features: {column} {twice!r} has more than one row; keep one")
    value = value_expression(con, f"(SELECT key AS raw FROM {table})", types["key"], f"--{key}-features, {column}")
    keyed = f"(SELECT *, key AS raw FROM {table})"
    joined = f"{codes.table} c JOIN (SELECT *, {value} AS value FROM {keyed}) t ON c.value::VARCHAR = t.value::VARCHAR"
    present, total = one(con, f"SELECT count(*) FROM {joined}"), one(con, f"SELECT count(*) FROM {codes.table}")
    if not present:
        raise DataError(f"--{key}-features: no {column} of the log is in the file; look at its column {column}")
    if present < total:
        notes.append(f"{total - present:,} of {total:,} {key}s have no features: categories are 0, numbers 0")
    by_id, categories = {}, {}
    for place, name in enumerate(names):
        kind = types[f"f{place}"]
        if _is_number(con, table, f"f{place}", kind):
            number = f"coalesce(TRY_CAST(t.f{place} AS FLOAT), 0)"
            by_id[name] = by_code(con, f"SELECT c.id, {number} FROM {joined}", codes.count + 1)
            if not np.isfinite(by_id[name]).all():
                raise DataError(f"--{key}-features, column {name}: has values that are not finite")
        else:
            title = f"--{key}-features, column {name}"
            file = None if given is None else given.file(name)
            distinct = f"(SELECT DISTINCT f{place} AS raw FROM {table} WHERE f{place} IS NOT NULL)"
            own = make_codes(con, f"codes_{key}_{place}", distinct, kind, title, file)
            ids = f"SELECT c.id, f.id AS value FROM {joined} JOIN {own.table} f ON t.f{place} = f.raw"
            by_id[name], categories[name] = by_code(con, ids, codes.count + 1), own
    return Features(by_id, categories)


def _is_number(con: duckdb.DuckDBPyConnection, table: str, field: str, kind: Column) -> bool:
    """True for floating point, and for text of numbers some of which have a fraction."""
    if not kind.text:
        return kind.is_real
    some = one(con, f"SELECT count(*) FROM {table} WHERE regexp_full_match({field}, '{_FRACTION}')")
    odd = f"SELECT count(*) FROM {table} WHERE {field} IS NOT NULL AND TRY_CAST({field} AS DOUBLE) IS NULL"
    return bool(some) and not one(con, odd)


def number_expression(con: duckdb.DuckDBPyConnection, name: str, column: Column, title: str) -> str:
    """SQL of a column of `log` as FLOAT. Raises DataError where a value is missing or no finite number."""
    bad = f"SELECT count(*) FROM log WHERE TRY_CAST({quoted(name)} AS DOUBLE) IS NULL"
    if not (column.sql == "VARCHAR" or column.is_whole or column.is_real or column.sql == "BOOLEAN"):
        raise DataError(f"{title}: has type {column.sql}, wanted numbers")
    if count := one(con, bad + f" OR NOT isfinite(TRY_CAST({quoted(name)} AS FLOAT))"):
        raise DataError(f"{title}: {count:,} values are missing or no finite numbers; correct or leave out these rows")
    return f"{quoted(name)}::DOUBLE::FLOAT"
