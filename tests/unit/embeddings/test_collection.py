"""The one lookup of a step: the right vectors for history and candidates, whatever is empty."""

from collections.abc import Callable

import pytest
import torch
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.modules.embedding_configs import DataType

from gr.config.tree import EmbeddingsConfig
from gr.embeddings import CANDIDATE_FEATURE, build_collection, local_shards, lookup
from gr.embeddings.collection import stored_dim

# lengths of the examples, ids of the history, ids of the candidates
CASES = [
    ([2, 1], [3, 4, 3], [11, 3]),
    ([0, 3, 0], [5, 6, 7], [1]),
    ([0, 0], [], [9, 8]),
    ([2], [1, 2], []),
    ([0], [], []),
]


@pytest.mark.parametrize(("dim", "stored"), [(1, 4), (4, 4), (5, 8), (50, 52), (64, 64)])
def test_stored_dim(dim: int, stored: int) -> None:
    assert stored_dim(dim) == stored


def test_the_collection_is_one_table_without_storage() -> None:
    collection = build_collection(1_000_000_000, 50, EmbeddingsConfig(dtype="fp16"))
    (table,) = collection.embedding_configs()
    assert (table.num_embeddings, table.embedding_dim, table.data_type) == (1_000_000_000, 52, DataType.FP16)
    assert table.feature_names == ["item_id", CANDIDATE_FEATURE]
    assert all(parameter.is_meta for parameter in collection.parameters())


@pytest.mark.parametrize("kind", ["rowwise_adagrad", "adam"], ids=["fused kernel", "dense kernel"])
@pytest.mark.parametrize("dim", [6, 8])
def test_lookup(make_table: Callable, dim: int, kind: str) -> None:
    model = make_table(dim=dim, kind=kind)
    tables = get_unwrapped_module(model).tables
    (shard,) = local_shards(model)
    assert shard.weight.shape == (12, 8)
    for lengths, history, candidates in CASES:
        batch = KeyedJaggedTensor(
            keys=["item_id"], values=torch.tensor(history, dtype=torch.int64), lengths=torch.tensor(lengths)
        )
        tokens_TD, items_KD = lookup(tables, batch, torch.tensor(candidates, dtype=torch.int64), dim)
        assert torch.equal(tokens_TD, shard.weight[history][:, :dim])
        assert torch.equal(items_KD, shard.weight[candidates][:, :dim])
        assert batch.lengths().tolist() == lengths, "the batch itself must not change"


def test_history_and_candidates_share_one_gradient(make_table: Callable) -> None:
    """Row 3 is looked up twice by the history and once as a candidate: with SGD it moves by the sum."""
    model = make_table(kind="sgd", lr=1.0)
    tables = get_unwrapped_module(model).tables
    (shard,) = local_shards(model)
    before = shard.weight.clone()
    batch = KeyedJaggedTensor(keys=["item_id"], values=torch.tensor([3, 4, 3]), lengths=torch.tensor([2, 1]))
    tokens_TD, items_KD = lookup(tables, batch, torch.tensor([3, 9]), 8)
    (tokens_TD.sum() + 10 * items_KD.sum()).backward()
    moved = (before - shard.weight)[:, 0]
    assert torch.allclose(moved, torch.tensor([0, 0, 0, 12.0, 1, 0, 0, 0, 0, 10, 0, 0]), atol=1e-5)
