"""Values of a log as raw ids, which get rows while a model is trained (embeddings.tables.COLUMN.ids)."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from gr.errors import DataError
from gr.schema import RAW_IDS


def raw_ids(values: Iterable[Any] | pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A raw id, int64 from 1 to 2^63 - 2, of each text or whole number, the same in every process; 0 of null.

    It is BLAKE2b of the value, of 63 bits: two of n values share one with probability n^2 / 2^64, which is 5e-8 of a
    million and 0.05 of a billion. Raises DataError for values of another kind.
    """
    try:
        column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    except pa.ArrowException as error:
        raise DataError(f"raw ids: {error}") from None
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise DataError(f"raw ids: the values are {kind}, wanted text or whole numbers")
    chunk = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    distinct = chunk.dictionary_encode()
    hashes = np.array([0, *(_hash(value) for value in distinct.dictionary.to_pylist())], dtype=np.int64)
    return hashes[distinct.indices.cast(pa.int64()).fill_null(-1).to_numpy() + 1]


def _hash(value: str | int) -> int:
    digest = hashlib.blake2b(str(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % (RAW_IDS - 1) + 1
