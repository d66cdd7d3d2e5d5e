"""The definition of codes and of the order of events, in Python and numpy.

B rows, V values.
"""

from collections.abc import Hashable

import numpy as np
import pyarrow as pa


class ReferenceCodes:
    """Codes from 0 on for the values of a column, in the order in which they first come."""

    def __init__(self, kind: pa.DataType) -> None:
        """kind: string or int64."""
        self._kind = kind
        self._codes: dict[Hashable, int] = {}

    def __len__(self) -> int:
        """V: the values so far."""
        return len(self._codes)

    def encode(self, values: pa.Array) -> np.ndarray:
        """The codes of a block, int32 [B], -1 for null; values that are new get the next ones."""
        codes = self._codes
        listed = values.to_pylist()
        return np.array([-1 if v is None else codes.setdefault(v, len(codes)) for v in listed], dtype=np.int32)

    def values(self) -> pa.Array:
        """The value of each code, [V]."""
        return pa.array(self._codes, type=self._kind)


def order_reference(user_B: np.ndarray, time_B: np.ndarray | None) -> np.ndarray:
    """The rows by user, then time (where there is one), then place: int [B]."""
    return np.lexsort((user_B,) if time_B is None else (time_B, user_B))
