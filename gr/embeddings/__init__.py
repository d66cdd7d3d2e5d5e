"""Embedding tables: built on meta, filled by (seed, table, row), looked up, and stepped by one optimizer."""

from gr.embeddings.collection import (
    CANDIDATE_FEATURE,
    build_tables,
    candidate_feature,
    lookup,
    move_tables_to_meta,
    pooled_lookup,
    pooled_vectors,
    row_weighted_vectors,
    sequence_vectors,
    table_weights,
    with_candidates,
)
from gr.embeddings.dynamic import HandedOver, IdMap, id_map_of, map_ids
from gr.embeddings.init import InitialRows, initialise_tables
from gr.embeddings.local_shards import TableShard, local_shards
from gr.embeddings.optimizers import TableOptimizer
from gr.embeddings.pipelined_lookup import PipelinedLookup

__all__ = [
    "CANDIDATE_FEATURE",
    "HandedOver",
    "IdMap",
    "InitialRows",
    "PipelinedLookup",
    "TableOptimizer",
    "TableShard",
    "build_tables",
    "candidate_feature",
    "id_map_of",
    "initialise_tables",
    "local_shards",
    "lookup",
    "map_ids",
    "move_tables_to_meta",
    "pooled_lookup",
    "pooled_vectors",
    "row_weighted_vectors",
    "sequence_vectors",
    "table_weights",
    "with_candidates",
]
