"""Tables on meta, sequence (EmbeddingCollection) and pooled (EmbeddingBagCollection), and a step's lookups in them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    KeyedTensor,
)
from torchrec.modules.embedding_configs import DataType, PoolingType

from gr.batch import ITEM_FEATURE
from gr.config.inventory import ROW_MULTIPLE, stored_dim
from gr.config.tree import EmbeddingsConfig
from gr.errors import ConfigError

CANDIDATE_FEATURE = "candidate_id"


@dataclass(frozen=True)
class PooledTable:
    """A table of which an example reads the sum or mean of some rows: rows x dim, one vector for each feature."""

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]
    pooling: Literal["sum", "mean"] = "sum"


def build_collection(rows: int, dim: int, config: EmbeddingsConfig) -> EmbeddingCollection:
    """The item table, without storage: rows x stored_dim(dim), read by the history and by the candidates."""
    table = _sequence_table(ITEM_FEATURE, rows, dim, [ITEM_FEATURE, CANDIDATE_FEATURE], config)
    return EmbeddingCollection([table], device=torch.device("meta"))


def build_feature_collection(rows: Mapping[str, int], dim: int, config: EmbeddingsConfig) -> EmbeddingCollection:
    """A table for each feature, without storage: rows x stored_dim(dim), of the feature's name."""
    tables = [_sequence_table(name, count, dim, [name], config) for name, count in rows.items()]
    return EmbeddingCollection(tables, device=torch.device("meta"))


def _sequence_table(
    name: str, rows: int, dim: int, features: Sequence[str], config: EmbeddingsConfig
) -> EmbeddingConfig:
    return EmbeddingConfig(
        name=name,
        num_embeddings=rows,
        embedding_dim=stored_dim(dim),
        feature_names=list(features),
        data_type=_data_type(config),
    )


def build_bag_collection(tables: Sequence[PooledTable], config: EmbeddingsConfig) -> EmbeddingBagCollection:
    """The pooled tables, without storage. Raises ConfigError for a width that fbgemm cannot store, and for repeats."""
    for table in tables:
        if table.dim % ROW_MULTIPLE:
            raise ConfigError(
                f"table {table.name}: dim={table.dim} is not a multiple of {ROW_MULTIPLE}, as fbgemm needs it; "
                f"use {stored_dim(table.dim)}"
            )
    for what, names in (
        ("table", [table.name for table in tables]),
        ("feature", [feature for table in tables for feature in table.features]),
    ):
        if repeated := sorted(name for name, times in Counter(names).items() if times > 1):
            raise ConfigError(
                f"pooled tables: {what} {', '.join(repeated)} is named more than once; the names of the tables must "
                "differ, and so must the features that they read"
            )
    configs = [
        EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.rows,
            embedding_dim=table.dim,
            feature_names=list(table.features),
            pooling=PoolingType.MEAN if table.pooling == "mean" else PoolingType.SUM,
            data_type=_data_type(config),
        )
        for table in tables
    ]
    return EmbeddingBagCollection(configs, device=torch.device("meta"))


def _data_type(config: EmbeddingsConfig) -> DataType:
    return DataType.FP16 if config.dtype == "fp16" else DataType.FP32


def lookup(
    collection: torch.nn.Module, history: KeyedJaggedTensor, candidates_K: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Vectors of the history's tokens and of the candidates, in one pass over the (sharded) table.

    Returns float [T, dim] and float [K, dim]. One KJT carries both, so that there is one all-to-all a step; the
    candidates belong to no example and are filed under the first.
    """
    lengths = history.lengths()
    filed = torch.zeros_like(lengths)
    filed[0] = candidates_K.numel()
    both = KeyedJaggedTensor(
        keys=[ITEM_FEATURE, CANDIDATE_FEATURE],
        values=torch.cat([history.values(), candidates_K]),
        lengths=torch.cat([lengths, filed]),
    )
    rows = collection(both)
    return rows[ITEM_FEATURE].values()[:, :dim], rows[CANDIDATE_FEATURE].values()[:, :dim]


def pooled_lookup(collection: torch.nn.Module, features: KeyedJaggedTensor, names: Sequence[str]) -> list[Tensor]:
    """The pooled vectors of `names`, float [B, dim] each, from a (sharded) collection that may read other features too.

    Models go by name, as here: the order of the columns in the collection's own output depends on the plan.
    """
    return pooled_vectors(collection(features), names)


def pooled_vectors(pooled: KeyedTensor, names: Sequence[str]) -> list[Tensor]:
    """Of what a collection returned. One split of all columns: by name, each would have a gradient as wide as all."""
    by_name = pooled.to_dict()
    return [by_name[name] for name in names]
