"""Embedding tables: built on meta, sharded by a plan, filled by (seed, table, row), stepped by one optimizer."""

from gr.embeddings.collection import (
    CANDIDATE_FEATURE,
    PooledTable,
    build_bag_collection,
    build_collection,
    build_feature_collection,
    build_row_weighted_collection,
    lookup,
    pooled_lookup,
    pooled_vectors,
    row_weighted_vectors,
    sequence_vectors,
    with_candidates,
)
from gr.embeddings.init import initialise_tables
from gr.embeddings.optimizers import TableOptimizer
from gr.embeddings.sharding import shard_tables
from gr.embeddings.shards import TableShard, local_shards
from gr.embeddings.staged import StagedLookup

__all__ = [
    "CANDIDATE_FEATURE",
    "PooledTable",
    "StagedLookup",
    "TableOptimizer",
    "TableShard",
    "build_bag_collection",
    "build_collection",
    "build_feature_collection",
    "build_row_weighted_collection",
    "initialise_tables",
    "local_shards",
    "lookup",
    "pooled_lookup",
    "pooled_vectors",
    "row_weighted_vectors",
    "sequence_vectors",
    "shard_tables",
    "with_candidates",
]
