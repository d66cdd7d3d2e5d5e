"""Pooled tables that several features read, and the compute kernel of a sharded table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torchrec import EmbeddingBagCollection

from gr.config.inventory import TableConfig
from gr.config.optim import TableOptimizerConfig
from gr.config.run import EmbeddingsConfig
from gr.embeddings import build_tables


@dataclass(frozen=True)
class PooledTable:
    """A table of rows x dim, which gives an example one vector for each feature."""

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]
    pooling: Literal["sum", "mean"] = "sum"

    def config(self, embeddings: EmbeddingsConfig) -> TableConfig:
        return TableConfig(
            name=self.name,
            rows=self.rows,
            dim=self.dim,
            pooling=self.pooling,
            features=len(self.features),
            dtype=embeddings.dtype,
            optimizer=embeddings.optimizer.kind,
        )


def build_bags(tables: Sequence[PooledTable], embeddings: EmbeddingsConfig) -> EmbeddingBagCollection:
    """The tables on meta."""
    names = {table.name: table.features for table in tables}
    collection = build_tables([table.config(embeddings) for table in tables], names)
    assert isinstance(collection, EmbeddingBagCollection)
    return collection


def compute_kernel(optimizer: TableOptimizerConfig, device: torch.device, sharding_type: str) -> str:
    """The kernel that TorchRec runs: fused wherever fbgemm can."""
    fused = sharding_type != "data_parallel" and (device.type == "cuda" or optimizer.fused_on_cpu)
    return "fused" if fused else "dense"
