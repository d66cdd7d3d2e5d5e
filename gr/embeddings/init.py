"""Initial weights as a function of (seed, table, row, column), so that they do not depend on the plan or world size."""

import hashlib
import math

import torch
from torch import Tensor, nn

from gr.embeddings.shards import TableShard, local_shards

# Two standard deviations, as torch.nn.init.trunc_normal_ users in the field cut it.
CUT = 2.0
CHUNK_ELEMENTS = 1 << 20


def initialise_tables(model: nn.Module, *, seed: int, std: float, dim: int) -> None:
    """Fills every local shard with a truncated normal of standard deviation `std`; columns from `dim` on are zero."""
    for shard in local_shards(model):
        _fill(shard, _table_key(seed, shard.table), std, dim)


def truncated_normal(counters: Tensor, key: int, std: float) -> Tensor:
    """float64, one value for each int64 counter: inverse-CDF of a normal cut at CUT deviations, on a hash of it."""
    uniform = ((_shift(_mix(counters + key), 11)).double() + 0.5) * 2.0**-53
    low = 0.5 * (1 + math.erf(-CUT / math.sqrt(2)))
    return torch.erfinv(2 * (low + uniform * (1 - 2 * low)) - 1) * (math.sqrt(2) * std)


def _fill(shard: TableShard, key: int, std: float, dim: int) -> None:
    rows, columns = shard.weight.shape
    device = shard.weight.device
    column = torch.arange(columns, device=device) + shard.column_offset
    for first in range(0, rows, max(1, CHUNK_ELEMENTS // columns)):
        chunk = shard.weight[first : first + max(1, CHUNK_ELEMENTS // columns)]
        row = torch.arange(len(chunk), device=device) + (shard.row_offset + first)
        values = truncated_normal(row[:, None] * shard.shape[1] + column, key, std)
        chunk.copy_(torch.where(column < dim, values, 0.0))


def _table_key(seed: int, table: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{table}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64 (Steele, Lea and Flood, OOPSLA 2014), in int64 with wrap-around."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift(x, 31)
