"""splitmix64 (Steele, Lea and Flood, OOPSLA 2014), draws as a function of a counter, in int64 with wrap-around."""

from torch import Tensor


def splitmix64(counters: Tensor) -> Tensor:
    """A hash of each int64 counter, int64."""
    x = counters + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ shift_right(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hashed_rows(ids: Tensor, rows: int) -> Tensor:
    """The row of each hashed id (embeddings.tables.COLUMN.ids), int64 in [0, rows)."""
    return shift_right(splitmix64(ids), 1) % rows
