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
    JaggedTensor,
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
    _check(tables)
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


def build_row_weighted_collection(tables: Sequence[PooledTable], config: EmbeddingsConfig) -> EmbeddingCollection:
    """As build_bag_collection, for sums in which every row of a table has a learned weight: see row_weighted_vectors.

    Column dim of a table is a row's weight less one, so that a column of zeros weighs all rows alike. It makes the
    table ROW_MULTIPLE columns wider; a row-wise optimizer has one state for the row and its weight together.
    """
    _check(tables)
    configs = [
        EmbeddingConfig(
            name=table.name,
            num_embeddings=table.rows,
            embedding_dim=table.dim + ROW_MULTIPLE,
            feature_names=list(table.features),
            data_type=_data_type(config),
        )
        for table in tables
    ]
    return EmbeddingCollection(configs, device=torch.device("meta"))


def _check(tables: Sequence[PooledTable]) -> None:
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


def _data_type(config: EmbeddingsConfig) -> DataType:
    return DataType.FP16 if config.dtype == "fp16" else DataType.FP32


def lookup(
    collection: torch.nn.Module, history: KeyedJaggedTensor, candidates_K: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Vectors of the history's tokens and of the candidates, float [T, dim] and [K, dim], from the (sharded) table."""
    return sequence_vectors(collection(with_candidates(history, candidates_K)), dim)


def with_candidates(history: KeyedJaggedTensor, candidates_K: Tensor) -> KeyedJaggedTensor:
    """The ids of both, so that there is one pass over the table and one all-to-all a step.

    Candidates belong to no example and are filed under the first.
    """
    lengths = history.lengths()
    filed = torch.zeros_like(lengths)
    filed[0] = candidates_K.numel()
    return KeyedJaggedTensor(
        keys=[ITEM_FEATURE, CANDIDATE_FEATURE],
        values=torch.cat([history.values(), candidates_K]),
        lengths=torch.cat([lengths, filed]),
    )


def sequence_vectors(found: Mapping[str, JaggedTensor], dim: int) -> tuple[Tensor, Tensor]:
    """Of what was found with_candidates: vectors of the history's tokens [T, dim] and of the candidates [K, dim]."""
    return found[ITEM_FEATURE].values()[:, :dim], found[CANDIDATE_FEATURE].values()[:, :dim]


def pooled_lookup(collection: torch.nn.Module, features: KeyedJaggedTensor, names: Sequence[str]) -> list[Tensor]:
    """The pooled vectors of `names`, float [B, dim] each, from a (sharded) collection that may read other features too.

    Models go by name, as here: the order of the columns in the collection's own output depends on the plan.
    """
    return pooled_vectors(collection(features), names)


def pooled_vectors(pooled: KeyedTensor, names: Sequence[str]) -> list[Tensor]:
    """Of what a collection returned. One split of all columns: by name, each would have a gradient as wide as all."""
    by_name = pooled.to_dict()
    return [by_name[name] for name in names]


def row_weighted_vectors(rows: Mapping[str, JaggedTensor], names: Sequence[str], dim: int) -> list[Tensor]:
    """Of what a row-weighted collection returned: the sum over each bag of its rows times their weights, [B, dim] each.

    As facebookresearch/dlrm --weighted-pooling learned, whose weights start at one.
    """
    return [_weighted_sum(rows[name], dim) for name in names]


def _weighted_sum(bag: JaggedTensor, dim: int) -> Tensor:
    rows_T, lengths_B = bag.values(), bag.lengths()
    weighted_TD = rows_T[:, :dim] * (1 + rows_T[:, dim : dim + 1])
    examples = torch.arange(len(lengths_B), device=lengths_B.device)
    example_T = torch.repeat_interleave(examples, lengths_B, output_size=len(rows_T))
    return weighted_TD.new_zeros(len(lengths_B), dim).index_add(0, example_T, weighted_TD)
