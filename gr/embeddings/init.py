"""Initial weights as a function of (seed, table, row, column), so that they do not depend on the plan or world size."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gr.config.run import EmbeddingsConfig
from gr.embeddings.local_shards import TableShard, local_shards
from gr.ops.splitmix64 import shift_right, splitmix64

# Two standard deviations, as torch.nn.init.trunc_normal_ users in the field cut it.
CUT = 2.0
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class InitialRows:
    """The initial values of tables.

    dim: columns of sequence tables from it on are zero; None where there are none. Pooled tables are as wide as what
    is read.
    """

    seed: int
    embeddings: EmbeddingsConfig
    dim: int | None = None

    def fill(self, shard: TableShard) -> None:
        """Gives every row the values of its place in the table."""
        rows, columns = shard.weight.shape
        for first in range(0, rows, max(1, CHUNK_ELEMENTS // columns)):
            chunk = shard.weight[first : first + max(1, CHUNK_ELEMENTS // columns)]
            row = torch.arange(len(chunk), device=chunk.device) + (shard.row_offset + first)
            chunk.copy_(self._values(shard, row * shard.shape[1]))

    def of_ids(self, shard: TableShard, id_N: Tensor) -> Tensor:
        """Values of raw ids, float64 [N, columns of the shard]: those of an id wherever its row is, and whenever."""
        return self._values(shard, splitmix64(id_N.to(shard.weight.device)))

    def _values(self, shard: TableShard, counter_N: Tensor) -> Tensor:
        column = torch.arange(shard.weight.shape[1], device=counter_N.device) + shard.column_offset
        counters, key = counter_N[:, None] + column, key_of(self.seed, shard.table)
        if self.embeddings.init == "uniform_rows":
            values = uniform(counters, key, 1 / math.sqrt(shard.shape[0]))
        else:
            values = truncated_normal(counters, key, self.embeddings.init_std)
        dim = shard.shape[1] if self.dim is None or shard.is_pooled else self.dim
        return torch.where(column < dim, values, 0.0)


def initialise_tables(model: nn.Module, *, seed: int, embeddings: EmbeddingsConfig, dim: int | None = None) -> None:
    """Fills every local shard; TorchRec starts sequence tables at random and copies no weights into pooled ones.

    dim: as in InitialRows.
    """
    initial = InitialRows(seed, embeddings, dim)
    for shard in local_shards(model):
        initial.fill(shard)


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


def key_of(seed: int, name: str) -> int:
    """A key for the draws of one named tensor, such as a table."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
