"""Lookups of fused kernels on CPU, by gr.ops.pooled_lookup and gr.ops.row_update: fbgemm-gpu-cpu's in less time.

fbgemm still owns the tables, their states and the learning rate, so checkpoints are what they were. Means stay with it.
"""

from dataclasses import replace
from functools import partial
from typing import cast

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from gr.config.optim import TABLE_OPTIMIZERS, TableOptimizerConfig
from gr.embeddings.row_gradients import rows_of, runs_of
from gr.ops.pooled_lookup import BagUpdate, pooled_lookup
from gr.ops.row_update import reference, row_update
from gr.ops.row_update.reference import RowRule, States


def _rule(optimizer: EmbOptimType) -> RowRule:
    """The rule of the table optimizer that fbgemm fuses on CPU under this name."""
    for kind in TABLE_OPTIMIZERS:
        config = cast(type[TableOptimizerConfig], TABLE_OPTIMIZERS.config(kind))
        if config.fused_on_cpu and EmbOptimType[config.fused_type] == optimizer:
            return TABLE_OPTIMIZERS.target_of(kind)
    raise AssertionError(f"{optimizer} is not fused on CPU")


def take_lookup(tables: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    """Has fused tables look rows up and update them here, where they are on CPU and not pooled by means."""
    if not tables.use_cpu or tables.pooling_mode == PoolingMode.MEAN:
        return
    rule = _rule(tables.optimizer)
    plain = rule is reference.sgd
    states = [{} for _ in tables.embedding_specs] if plain else tables.get_optimizer_state()
    # None of these rules counts steps.
    numbers = {"steps": 0.0} if plain else {"steps": 0.0, "eps": tables.optimizer_args.eps}
    update = BagUpdate(rule, states, numbers)
    tables.forward = partial(_lookup, tables, tables.split_embedding_weights(), update)


def _lookup(
    tables: SplitTableBatchedEmbeddingBagsCodegen,
    weights: list[Tensor],
    update: BagUpdate,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """fbgemm's forward: float32 [B, columns of all features] of bags, [T, D] of sequences.

    update: without the learning rate, which may change.
    """
    if per_sample_weights is not None:
        raise ValueError("fused kernels on CPU take no weights of ids")
    update = replace(update, numbers={**update.numbers, "lr": float(tables.learning_rate_tensor)})
    if tables.pooling_mode == PoolingMode.SUM:
        return pooled_lookup(weights, tables.feature_table_map, indices.long(), offsets.long(), update)
    outputs = []
    for table, _, bounds in runs_of(tables.feature_table_map, offsets):
        ids_T, weight_ED = indices[int(bounds[0]) : int(bounds[-1])].long(), weights[table]
        change = partial(_change, update, weight_ED, update.states[table], ids_T)
        outputs.append(rows_of(weight_ED, ids_T, change))
    return torch.cat(outputs)


def _change(update: BagUpdate, weight_ED: Tensor, states: States, ids_T: Tensor, gradient_TD: Tensor) -> None:
    row_update(update.rule, weight_ED, states, ids_T, gradient_TD, None, **update.numbers)
