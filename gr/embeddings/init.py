"""Initial weights as a function of (seed, table, row, column), so that they do not depend on the plan or world size."""

import hashlib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gr.config.run import EmbeddingsConfig
from gr.embeddings.local_shards import TableShard, local_shards
from gr.ops.splitmix64 import shift_right, splitmix64

# Two standard deviations, as torch.nn.init.trunc_normal_ users in the field cut it.
CUT = 2.0
CHUNK_ELEMENTS = 1 << 20


def initialise_tables(model: nn.Module, *, seed: int, embeddings: EmbeddingsConfig, dim: int | None = None) -> None:
    """Fills every local shard; TorchRec starts sequence tables at random and copies no weights into pooled ones.

    dim: columns of sequence tables from it on are zero; None where there are none. Pooled tables are as wide as what
    is read.
    """
    for shard in local_shards(model):
        key = key_of(seed, shard.table)
        if embeddings.init == "uniform_rows":
            draw = partial(uniform, key=key, bound=1 / math.sqrt(shard.shape[0]))
        else:
            draw = partial(truncated_normal, key=key, std=embeddings.init_std)
        _fill(shard, draw, shard.shape[1] if dim is None or shard.is_pooled else dim)


def truncated_normal(counters: Tensor, key: int, std: float) -> Tensor:
    """float64, one value for each int64 counter: inverse-CDF of a normal cut at CUT deviations, on a hash of it."""
    low = 0.5 * (1 + math.erf(-CUT / math.sqrt(2)))
    return torch.erfinv(2 * (low + open_unit(counters, key) * (1 - 2 * low)) - 1) * (math.sqrt(2) * std)


def normal(counters: Tensor, key: int) -> Tensor:
    """float64, standard normal, one value for each int64 counter: inverse CDF on a hash of it."""
    return torch.erfinv(2 * open_unit(counters, key) - 1) * math.sqrt(2)


def uniform(counters: Tensor, key: int, bound: float) -> Tensor:
    """float64 in (-bound, bound), one value for each int64 counter; 1/sqrt(rows) is DLRM's (facebookresearch/dlrm)."""
    return (2 * open_unit(counters, key) - 1) * bound


def open_unit(counters: Tensor, key: int) -> Tensor:
    """float64, uniform in (0, 1), one value for each int64 counter: a hash of it."""
    return (shift_right(splitmix64(counters + key), 11).double() + 0.5) * 2.0**-53


def _fill(shard: TableShard, draw: Callable[[Tensor], Tensor], dim: int) -> None:
    rows, columns = shard.weight.shape
    device = shard.weight.device
    column = torch.arange(columns, device=device) + shard.column_offset
    for first in range(0, rows, max(1, CHUNK_ELEMENTS // columns)):
        chunk = shard.weight[first : first + max(1, CHUNK_ELEMENTS // columns)]
        row = torch.arange(len(chunk), device=device) + (shard.row_offset + first)
        values = draw(row[:, None] * shard.shape[1] + column)
        chunk.copy_(torch.where(column < dim, values, 0.0))


def key_of(seed: int, name: str) -> int:
    """A key for the draws of one named tensor, such as a table."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
