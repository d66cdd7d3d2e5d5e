"""Lookups of fused kernels on CPU, by gr.ops.pooled_lookup: the sums of fbgemm-gpu-cpu and its updates in less time.

fbgemm still owns the tables, their states and the learning rate, so checkpoints are what they were. Means stay with it.
"""

from functools import partial

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from gr.ops.pooled_lookup import BagUpdate, pooled_lookup
from gr.ops.row_update import reference
from gr.ops.row_update.reference import RowRule, States

_RULES: dict[EmbOptimType, RowRule] = {
    EmbOptimType.EXACT_SGD: reference.sgd,
    EmbOptimType.EXACT_ADAGRAD: reference.adagrad,
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: reference.rowwise_adagrad,
}


def take_bags(tables: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    """Has fused tables look up bags and update their rows here, where they are on CPU and pooled by sums."""
    if tables.use_cpu and tables.pooling_mode == PoolingMode.SUM:
        rule = _RULES[tables.optimizer]
        plain = rule is reference.sgd
        states = [{} for _ in tables.embedding_specs] if plain else tables.get_optimizer_state()
        numbers = {} if plain else {"eps": tables.optimizer_args.eps}
        weights = tables.split_embedding_weights()
        tables.forward = partial(_lookup, tables, weights, tables.feature_table_map, rule, states, numbers)


def _lookup(
    tables: SplitTableBatchedEmbeddingBagsCodegen,
    weights: list[Tensor],
    of_feature: list[int],
    rule: RowRule,
    states: list[States],
    numbers: dict[str, float],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """fbgemm's forward: float32 [B, columns of all features]."""
    if per_sample_weights is not None:
        raise ValueError("fused kernels on CPU take no weights of ids")
    # None of these rules counts steps.
    update = BagUpdate(rule, states, {"lr": float(tables.learning_rate_tensor), "steps": 0, **numbers})
    return pooled_lookup(weights, of_feature, indices.long(), offsets.long(), update)
