"""The values that the ids of a column stand for: a log's own ids of users, items and categories. N ids.

pyarrow.compute takes longer to import than the rest of Arrow; where ids stand for themselves, serving needs none of it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.parquet import decoding
from gr.errors import DataError
from gr.schema import DataSchema, TabularSchema, vocabulary_file

NO_LIMIT = 2**63  # cardinality of a column that no model reads


@dataclass(frozen=True)
class Vocabulary:
    """ids_V: ascending, int64. values_V: ascending, whole numbers or text. Both None: an id stands for itself."""

    column: str
    ids_V: np.ndarray | None = None
    values_V: pa.Array | None = None

    @classmethod
    def open(cls, folder: Path, schema: DataSchema | TabularSchema, column: str) -> "Vocabulary":
        """The vocabulary of a column, of a data folder or a checkpoint; where there is none, ids stand for themselves.

        Raises DataError where the file is not the one that schema.json names, or is no vocabulary.
        """
        if column not in schema.vocabularies:
            return cls(column)
        path = folder / vocabulary_file(column)
        with decoding(path):
            content = path.read_bytes()
            check_digest(path, content, schema.vocabularies[column])
            file = pq.ParquetFile(pa.BufferReader(content))
            # A thread of Arrow's that lets go of Python's bytes as Python ends aborts the process (apache/arrow 34314).
            table = file.read(columns=["value", "id"], use_threads=False)
        check_entries(path, table.schema, table.to_batches(), schema.cardinalities.get(column, NO_LIMIT))
        return cls(column, table.column("id").to_numpy(), table.column("value").combine_chunks())

    def agrees(self, other: "Vocabulary") -> bool:
        """Whether ids stand for the same values."""
        if self.ids_V is None or other.ids_V is None or self.values_V is None:
            return self.ids_V is other.ids_V
        return np.array_equal(self.ids_V, other.ids_V) and self.values_V.equals(other.values_V)

    @property
    def type(self) -> pa.DataType:
        return pa.int64() if self.values_V is None else self.values_V.type

    def values(self, ids_N: np.ndarray) -> pa.Array:
        """The value of each id; null for one that stands for none."""
        if self.ids_V is None or self.values_V is None:
            return pa.array(ids_N, type=pa.int64())
        if not len(self.ids_V):
            return pa.nulls(len(ids_N), self.type)
        place_N = ids_N - self.ids_V[0] if self._is_dense else np.searchsorted(self.ids_V, ids_N)
        place_N = np.clip(place_N, 0, len(self.ids_V) - 1)
        return self.values_V.take(pa.array(place_N, mask=self.ids_V[place_N] != ids_N))

    @cached_property
    def _is_dense(self) -> bool:
        """Whether no id between the first and the last is missing, so that a place is a difference, not a search."""
        assert self.ids_V is not None
        return int(self.ids_V[-1]) - int(self.ids_V[0]) == len(self.ids_V) - 1

    def ids(self, values_N: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """The id of each value, int64; 0 for a null and for one that is not in the vocabulary."""
        ids_N, known_N = self.lookup(values_N)
        return np.where(known_N, ids_N, 0)

    @property
    def has_numbers(self) -> bool:
        """Whether ids stand for whole numbers, or for themselves."""
        return pa.types.is_integer(self.type)

    @cached_property
    def _numbers_V(self) -> np.ndarray:
        assert self.values_V is not None
        return self.values_V.to_numpy()

    def ids_of_numbers(self, numbers: np.ndarray) -> tuple[np.ndarray, int]:
        """The result of `lookup` for whole numbers of any shape, where has_numbers: ids, and how many have none.

        The id of these is 0.
        """
        if self.ids_V is None:
            return numbers, 0
        if not len(self.ids_V):
            return np.zeros_like(numbers), numbers.size
        place = np.minimum(np.searchsorted(self._numbers_V, numbers), len(self.ids_V) - 1)
        known = self._numbers_V[place] == numbers
        return np.where(known, self.ids_V[place], 0), numbers.size - int(np.count_nonzero(known))

    def lookup(self, values_N: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """The id of each value, int64, and whether it has one. (Where ids stand for themselves, 0 may be an id.)

        Raises DataError where the values are of another kind: text for whole numbers, or the other way round.
        """
        if isinstance(values_N, pa.ChunkedArray):
            values_N = values_N.combine_chunks()
        if pa.types.is_dictionary(values_N.type):
            values_N = values_N.dictionary_decode()
        try:
            if pa.types.is_string(self.type) and not _is_text(values_N.type):
                raise pa.ArrowInvalid("not cast here, as 7 may be 7 or 007")
            if pa.types.is_temporal(values_N.type) or pa.types.is_binary(values_N.type):  # a cast would make numbers
                raise pa.ArrowInvalid("they are times or bytes")
            cast_N = values_N.cast(self.type)
        except pa.ArrowException as error:
            kind = "text" if pa.types.is_string(self.type) else "whole numbers"
            raise DataError(
                f"column {self.column}: values of type {values_N.type} cannot be looked up, these are {kind}: cast "
                f"them ({error})"
            ) from None
        if self.ids_V is None or self.values_V is None:
            return cast_N.fill_null(0).to_numpy(zero_copy_only=False), cast_N.is_valid().to_numpy(zero_copy_only=False)
        known_N = cast_N.is_valid().to_numpy(zero_copy_only=False)
        ids_N = np.zeros(len(known_N), dtype=np.int64)
        if not len(self.ids_V):
            return ids_N, np.zeros_like(known_N)
        import pyarrow.compute as pc

        filled_N = cast_N.fill_null("" if pa.types.is_string(self.type) else 0)
        place_N = np.minimum(_count_below(self.values_V, filled_N), len(self.ids_V) - 1)
        known_N &= pc.equal(self.values_V.take(pa.array(place_N)), filled_N).to_numpy(zero_copy_only=False)
        ids_N[known_N] = self.ids_V[place_N[known_N]]
        return ids_N, known_N


def _count_below(values_V: pa.Array, values_N: pa.Array) -> np.ndarray:
    """How many of values_V, which ascend, are below each of values_N, int64.

    It is a search, since an index of all values would take more time than a batch and more memory than the values.
    """
    import pyarrow.compute as pc

    if not pa.types.is_string(values_V.type):
        return np.searchsorted(values_V.to_numpy(), values_N.to_numpy())
    below_N = np.zeros(len(values_N), dtype=np.int64)
    for bit in reversed(range(len(values_V).bit_length())):
        more_N = below_N + (1 << bit)
        less_N = pc.less(values_V.take(pa.array(np.minimum(more_N, len(values_V)) - 1)), values_N)
        below_N = np.where(less_N.to_numpy(zero_copy_only=False) & (more_N <= len(values_V)), more_N, below_N)
    return below_N


def check_digest(path: Path, content: bytes, digest: str) -> None:
    """Raises DataError where a vocabulary is not the one that schema.json names."""
    if hashlib.sha256(content).hexdigest() != digest:
        raise DataError(f"{path}: is not the file that schema.json names (SHA-256); prepare the data again")


def check_entries(path: Path, fields: pa.Schema, batches: Iterable[pa.RecordBatch], cardinality: int) -> None:
    """Raises DataError unless the entries of a file have values and ids of which each is above the one before.

    fields: of the columns value and id. cardinality: largest id + 1 at most.
    """
    import pyarrow.compute as pc

    kinds = [field.type for field in fields]
    is_known = fields.names == ["value", "id"] and kinds[1] == pa.int64()
    if not is_known or not (pa.types.is_integer(kinds[0]) or pa.types.is_string(kinds[0])):
        raise DataError(f"{path}: is no vocabulary, which has a value, int64 or text, and an id, int64; prepare again")
    last = fields.empty_table()
    for batch in batches:
        block = pa.concat_tables([last, pa.table(batch)]).combine_chunks()
        ascend = all(
            not each.null_count and pc.all(pc.less(each[:-1], each[1:]), min_count=0).as_py() for each in block.columns
        )
        if not ascend:
            raise DataError(f"{path}: its values and its ids must ascend; prepare the data again")
        last = block.slice(max(len(block) - 1, 0))
        first, final = (block.column("id")[place].as_py() for place in (0, -1)) if len(block) else (1, 1)
        if first < 1 or final >= cardinality:
            raise DataError(f"{path}: has ids from {first} to {final}, schema.json allows 1 to {cardinality - 1}")


def check_vocabularies(mine: Mapping[str, str], folder: Path, others: Mapping[str, str], path: Path) -> None:
    """Raises DataError where the ids of two folders stand for other values. mine, others: digests, by column."""
    for name in [*mine, *others]:
        if mine.get(name) != others.get(name):
            raise DataError(
                f"{folder} and {path} have other vocabularies of {name}: prepare {path} with "
                "`gr prepare events --vocabulary` and the folder that was trained on"
            )


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )
