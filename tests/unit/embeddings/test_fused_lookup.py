"""Lookups of fused kernels on CPU beside fbgemm's own: rows, and tables and states after their updates."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

from gr.embeddings.fused_lookup import take_lookup

ROWS, DIM = (50, 20), 8
KINDS = [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD]


def new_tables(optimizer: EmbOptimType, pooling: PoolingMode) -> SplitTableBatchedEmbeddingBagsCodegen:
    """Two tables; the first is read by two features."""
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in ROWS],
        feature_table_map=[0, 0, 1],
        optimizer=optimizer,
        learning_rate=0.1,
        eps=1e-4,
        pooling_mode=pooling,
    )
    random = torch.Generator().manual_seed(0)
    for weight in tables.split_embedding_weights():
        weight.copy_(torch.randn(weight.shape, generator=random))
    return tables


@pytest.mark.parametrize("pooling", [PoolingMode.NONE, PoolingMode.SUM])
@pytest.mark.parametrize("optimizer", KINDS)
def test_rows_and_updates_are_those_of_fbgemm(optimizer: EmbOptimType, pooling: PoolingMode) -> None:
    """Of ids that come more than once, in one feature and in both of a table; some bags and features are empty."""
    theirs, own = new_tables(optimizer, pooling), new_tables(optimizer, pooling)
    take_lookup(own)
    random = torch.Generator().manual_seed(1)
    for lengths in ([3, 0, 4, 5, 2, 2], [0, 0, 1, 1, 0, 0], [2, 2, 0, 0, 9, 1]):
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        ids = torch.randint(0, 15, (int(offsets[-1]),), generator=random)
        outputs = [tables(ids, offsets) for tables in (theirs, own)]
        torch.testing.assert_close(outputs[1], outputs[0])
        gradient = torch.randn(outputs[0].shape, generator=random)
        for tables, output in zip((theirs, own), outputs, strict=True):
            output.backward(gradient)
            tables.set_learning_rate(0.05)
    for mine, expected in zip(own.split_embedding_weights(), theirs.split_embedding_weights(), strict=True):
        torch.testing.assert_close(mine, expected)
    if optimizer != EmbOptimType.EXACT_SGD:
        for mine, expected in zip(own.get_optimizer_state(), theirs.get_optimizer_state(), strict=True):
            torch.testing.assert_close(mine, expected)


def test_nothing_is_updated_without_gradients() -> None:
    tables = new_tables(EmbOptimType.EXACT_SGD, PoolingMode.NONE)
    take_lookup(tables)
    with torch.no_grad():
        rows = tables(torch.tensor([3, 19]), torch.tensor([0, 1, 1, 2]))
    first, second = tables.split_embedding_weights()
    assert torch.equal(rows, torch.stack([first[3], second[19]])) and not rows.requires_grad
