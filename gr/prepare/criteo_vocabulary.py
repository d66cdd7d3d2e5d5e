"""Occurrences of values, counted in bounded memory, and the vocabularies made of them.

Counts in memory are sorted by value; when they are many they go to disk as a run, one .npy pair a column. A vocabulary
merges the runs range by range. V values.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.errors import DataError
from gr.prepare.criteo_rows import Categories

_ENTRIES = 6_000_000  # values with their counts in memory, over all columns: at most 16 bytes each, twice while merging
_LARGEST_VOCABULARY = 2**31 - 2


class ValueCounts:
    """Counts of the values of each column, with runs in `folder`, which must be empty."""

    def __init__(self, folder: Path, columns: Sequence[str], *, entries: int = _ENTRIES) -> None:
        self._folder, self._columns, self._limit = folder, columns, entries
        self._held: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in columns}
        self._entries = self._runs = 0

    def add(self, categories: Sequence[Categories]) -> None:
        """Count a block; one element a column."""
        for name, column in zip(self._columns, categories, strict=True):
            counts = np.bincount(column.codes_P, minlength=len(column.values))
            self._held[name].append((column.values, counts))
            self._entries += len(counts)
        if self._entries > self._limit:
            self._merge()
            if self._entries > self._limit // 2:
                self._spill()

    def close(self) -> None:
        """Write the counts that are still in memory."""
        self._merge()
        self._spill()

    def _merge(self) -> None:
        self._entries = 0
        for name, pairs in self._held.items():
            if pairs:
                merged = _sum(*(np.concatenate(arrays) for arrays in zip(*pairs, strict=True)))
                self._held[name] = [merged]
                self._entries += len(merged[0])

    def _spill(self) -> None:
        if not self._entries:
            return
        run = self._folder / f"run-{self._runs:05d}"
        run.mkdir()
        for name, pairs in self._held.items():
            for values, counts in pairs:
                np.save(run / f"{name}.values.npy", values)
                np.save(run / f"{name}.counts.npy", counts)
            pairs.clear()
        self._entries, self._runs = 0, self._runs + 1


def write_vocabulary(
    file: Path, name: str, runs: Sequence[Path], *, kind: pa.DataType, threshold: int, entries: int = _ENTRIES
) -> int:
    """Write the values of column `name` that occur at least `threshold` times over all runs; ids from 1 in the order of
    values. Returns their number. DataError if ids would not fit int32.
    """
    written = 0
    schema = pa.schema([("value", kind), ("id", pa.int32()), ("count", pa.int64())])
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        for values, counts in _merged(runs, name, entries):
            frequent = counts >= threshold
            size = int(frequent.sum())
            if written + size > _LARGEST_VOCABULARY:
                raise DataError(
                    f"{file}: column {name} has more than {_LARGEST_VOCABULARY} values; pass a --threshold above "
                    f"{threshold}"
                )
            ids = np.arange(written + 1, written + size + 1, dtype=np.int32)
            if size:
                writer.write_table(pa.table([values[frequent], ids, counts[frequent]], schema=schema))
            written += size
    return written


class Vocabulary:
    """The vocabulary of each column, in memory: 4 bytes a value (uint32) or 8 (int64)."""

    def __init__(self, folder: Path, columns: Sequence[str], max_rows: int | None = None) -> None:
        """Read one file a column. max_rows: see TabularSchema; None is no limit.

        DataError for a file that is missing, damaged, or not ascending with ids from 1.
        """
        self._values = [_read(folder / f"{name}.parquet") for name in columns]
        self._max_rows = _LARGEST_VOCABULARY + 1 if max_rows is None else max_rows

    @property
    def cardinalities(self) -> list[int]:
        """Largest id + 1 of each column."""
        return [min(len(values) + 1, self._max_rows) for values in self._values]

    @property
    def kind(self) -> pa.DataType:
        """Arrow type of the values: uint32 hexadecimal digits, int64 whole numbers."""
        return pa.from_numpy_dtype(self._values[0].dtype)

    def ids(self, categories: Sequence[Categories]) -> list[np.ndarray]:
        """Ids of a block, int32 [B] each; 0 for a missing value and for one that is not in the vocabulary."""
        ids = [_ids(values, column) for values, column in zip(self._values, categories, strict=True)]
        return [np.where(ids_B < self._max_rows, ids_B, (ids_B - 1) % (self._max_rows - 1) + 1) for ids_B in ids]


def _ids(vocabulary: np.ndarray, column: Categories) -> np.ndarray:
    ids_B = np.zeros(len(column.present_B), dtype=np.int32)
    if len(vocabulary) and len(column.values):
        order = np.argsort(column.values)  # ascending look-ups stay in the cache
        values = column.values[order]
        places = np.minimum(np.searchsorted(vocabulary, values), len(vocabulary) - 1)
        ids_V = np.empty(len(values), dtype=np.int32)
        ids_V[order] = np.where(vocabulary[places] == values, places + 1, 0)
        ids_B[column.present_B] = ids_V[column.codes_P]
    return ids_B


def _read(file: Path) -> np.ndarray:
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            kind = parquet.schema_arrow.field("value").type
            if kind not in (pa.uint32(), pa.int64()):
                raise DataError(f"{file}: column value has type {kind}, wanted uint32 or int64")
            values = np.empty(parquet.metadata.num_rows, dtype=kind.to_pandas_dtype())
            first = 0
            for batch in parquet.iter_batches(1 << 20, columns=["value", "id"]):
                ids = np.arange(first + 1, first + batch.num_rows + 1)
                if not np.array_equal(batch.column("id").to_numpy(), ids):
                    raise DataError(f"{file}: ids must be 1, 2, ... in order; write the vocabulary again")
                values[first : first + batch.num_rows] = batch.column("value").to_numpy()
                first += batch.num_rows
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"{file}: cannot be read: {error}; give --vocabulary a folder of `gr prepare criteo`"
        ) from error
    if (values[1:] <= values[:-1]).any():
        raise DataError(f"{file}: values must ascend; write the vocabulary again")
    return values


def _sum(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, ascending, and the sums of their counts."""
    order = np.argsort(values)
    values, counts = values[order], counts[order]
    if not len(values):
        return values, counts
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    return values[starts], np.add.reduceat(counts, starts)


def _merged(runs: Sequence[Path], name: str, entries: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Distinct values and counts over the runs, in ascending ranges of about `entries` // 2 values at most."""
    pairs = [
        tuple(np.load(run / f"{name}.{part}.npy", mmap_mode="r") for part in ("values", "counts"))
        for run in runs
        if (run / f"{name}.values.npy").exists()
    ]
    if not pairs:
        return
    ranges = -(-2 * sum(len(values) for values, _ in pairs) // entries)
    step = max(1, max(len(values) for values, _ in pairs) // (16 * ranges))
    sample = np.sort(np.concatenate([values[::step] for values, _ in pairs]))
    bounds = np.unique(sample[np.arange(1, ranges) * len(sample) // ranges])
    cuts = [np.concatenate([[0], np.searchsorted(values, bounds), [len(values)]]) for values, _ in pairs]
    for index in range(len(bounds) + 1):
        slices = [(pair, slice(cut[index], cut[index + 1])) for pair, cut in zip(pairs, cuts, strict=True)]
        yield _sum(*(np.concatenate([pair[part][where] for pair, where in slices]) for part in (0, 1)))
