"""Ids for the values of a column: a vocabulary, made of the log or taken from a prepared folder."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.parquet import decoding
from gr.data.vocabulary import NO_LIMIT, check_entries
from gr.errors import DataError
from gr.files import sha256_of
from gr.prepare.event_log import WHOLE, Column, literal, one
from gr.prepare.write import plain_table
from gr.schema import DataSchema, TabularSchema, vocabulary_file

_EXACT = {"FLOAT": 1 << 24, "DOUBLE": 1 << 53}  # up to here a type holds every whole number
_INT64 = 1 << 63


@dataclass(frozen=True)
class Given:
    """The vocabularies of a prepared folder."""

    folder: Path
    schema: DataSchema | TabularSchema

    def file(self, name: str) -> Path:
        """Raises DataError where there is no such vocabulary of a column, it is not the one that schema.json names, or
        is none.
        """
        digests = self.schema.vocabularies
        if name not in digests:
            raise DataError(f"{self.folder}: has no vocabulary of {name}; it has {', '.join(digests) or 'none at all'}")
        path = self.folder / vocabulary_file(name)
        if not path.is_file() or sha256_of(path) != digests[name]:
            raise DataError(f"{path}: is not the file that schema.json names (SHA-256); prepare that folder again")
        with decoding(path), pq.ParquetFile(path) as file:
            fields = pa.schema([field for field in file.schema_arrow if field.name in ("value", "id")])
            batches = file.iter_batches(columns=["value", "id"])
            check_entries(path, fields, batches, self.schema.cardinalities.get(name, NO_LIMIT))
        return path


@dataclass(frozen=True)
class Codes:
    """The ids of a column's values. table: in DuckDB, raw (as in the log), value (int64 or text), id (from 1).

    count: of ids; the largest. fixed: of a vocabulary that was given, so that values without an id may occur.
    """

    table: str
    count: int
    fixed: bool


def make_codes(
    con: duckdb.DuckDBPyConnection, codes: str, distinct: str, kind: Column, title: str, given: Path | None = None
) -> Codes:
    """Ids by ascending value, as table `codes`. distinct: SQL of a relation, whose column raw has each value once, of
    type `kind`; its other columns are kept. given: a vocabulary whose ids are used.

    Raises DataError where values are neither whole numbers nor text, or of another kind than the vocabulary's.
    """
    value = value_expression(con, distinct, kind, title)
    if given is None:
        numbered = f"SELECT *, {value} AS value, row_number() OVER (ORDER BY {value}) AS id FROM {distinct}"
    else:
        if pa.types.is_integer(pq.read_schema(given).field("value").type) != value.endswith("BIGINT"):
            raise DataError(f"{title}: its values and those of {given} are not both whole numbers or both text")
        numbered = (
            f"SELECT d.*, v.id FROM (SELECT *, {value} AS value FROM {distinct}) d "
            f"JOIN read_parquet({literal(given)}) v USING (value)"
        )
    con.execute(f"CREATE TABLE {codes} AS {numbered}")
    if given is None:
        if not (count := int(one(con, f"SELECT count(*) FROM {codes}"))):
            raise DataError(f"{title}: has no value; leave it out")
        return Codes(codes, count, False)
    return Codes(codes, int(one(con, f"SELECT coalesce(max(id), 0) FROM read_parquet({literal(given)})")), True)


def column_of_values(con: duckdb.DuckDBPyConnection, name: str, kind: Column, title: str) -> tuple[str, Column]:
    """SQL of a column of `log` as text or int64, and its type then. Raises DataError as value_expression does."""
    if kind.text:
        return name, kind
    sql = value_expression(con, f"(SELECT {name} AS raw FROM log)", kind, title)
    return sql.replace("raw", name), Column("BIGINT" if sql.endswith("BIGINT") else "VARCHAR", False)


def save_vocabulary(con: duckdb.DuckDBPyConnection, folder: Path, name: str, query: str, given: Given | None) -> str:
    """Makes vocabulary/<name>.parquet of a data folder and returns its SHA-256.

    It is the given one, or else what `query` selects: value ascending, id, count.
    """
    path = folder / vocabulary_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if given is not None:
        shutil.copyfile(given.file(name), path)
    else:
        rows = con.sql(query).to_arrow_reader(1 << 17)
        with pq.ParquetWriter(path, rows.schema, compression="zstd", write_page_checksum=True) as writer:
            for batch in rows:
                writer.write_batch(batch)
    return sha256_of(path)


def counted(con: duckdb.DuckDBPyConnection, codes: Codes, count_V: np.ndarray, least: int = 0) -> str:
    """The query of a vocabulary. count_V: int64 [ids + 1], of each id; those below `least` are left out."""
    id_V = np.flatnonzero(count_V >= least)
    con.register(f"{codes.table}_counts", plain_table({"id": id_V, "count": count_V[id_V]}))
    return f"SELECT value, id, n.count FROM {codes.table} JOIN {codes.table}_counts n USING (id) ORDER BY id"


def by_code(con: duckdb.DuckDBPyConnection, query: str, size: int) -> np.ndarray:
    """The values of a query's second column at the places of its first, from 0 on; other places have 0."""
    places, values = con.execute(query).fetchnumpy().values()
    array = np.zeros(size, dtype=values.dtype)
    array[places.astype(np.int64)] = values
    return array


def value_expression(con: duckdb.DuckDBPyConnection, distinct: str, kind: Column, title: str) -> str:
    """SQL of the value that stands for a raw one: int64 where all are whole numbers, text otherwise."""
    if kind.is_whole:
        if kind.sql in ("UBIGINT", "HUGEINT", "UHUGEINT"):
            largest = one(con, f"SELECT max(raw) FROM {distinct}")
            if largest is not None and largest >= _INT64:
                raise DataError(f"{title}: {largest} is beyond int64; write the column as text")
        return "raw::BIGINT"
    if kind.is_real:
        most = _EXACT.get(kind.sql, _INT64 - 1)  # decimals are exact
        whole = f"raw = floor(raw) AND abs(raw) <= {most}"  # NaN is equal to itself, and above all numbers
        odd = one(con, f"SELECT any_value(raw) FROM {distinct} WHERE NOT ({whole})")
        if odd is not None:
            bits = most.bit_length() if kind.sql not in _EXACT else most.bit_length() - 1
            raise DataError(f"{title}: {odd} is no whole number up to 2^{bits}; write ids as integers or text")
        return "raw::BIGINT"
    if kind.text:
        odd = one(con, f"SELECT count(*) FROM {distinct} WHERE NOT regexp_full_match(raw, '{WHOLE}')")
        return "raw::VARCHAR" if odd else "raw::BIGINT"
    if kind.sql == "VARCHAR" or kind.sql == "UUID" or kind.sql.startswith("ENUM"):
        return "raw::VARCHAR"
    if kind.sql == "BOOLEAN":
        return "raw::BOOLEAN::BIGINT"
    raise DataError(f"{title}: has type {kind.sql}, wanted whole numbers or text")
