"""Embedding tables: built on meta, sharded by a plan, filled by (seed, table, row), stepped by one optimizer."""

from gr.embeddings.collection import (
    CANDIDATE_FEATURE,
    PooledTable,
    build_bag_collection,
    build_collection,
    build_feature_collection,
    lookup,
    pooled_lookup,
    pooled_vectors,
)
from gr.embeddings.init import initialise_tables
from gr.embeddings.optimizers import TableOptimizer
from gr.embeddings.sharding import shard_tables
from gr.embeddings.shards import TableShard, local_shards

__all__ = [
    "CANDIDATE_FEATURE",
    "PooledTable",
    "TableOptimizer",
    "TableShard",
    "build_bag_collection",
    "build_collection",
    "build_feature_collection",
    "initialise_tables",
    "local_shards",
    "lookup",
    "pooled_lookup",
    "pooled_vectors",
    "shard_tables",
]
