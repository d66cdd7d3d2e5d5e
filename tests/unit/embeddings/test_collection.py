"""The lookups of a step: the right vectors for history, candidates and bags, whatever is empty."""

from collections.abc import Callable

import pytest
import torch
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.modules.embedding_configs import DataType, PoolingType

from gr.config.dlrm import stored_dim
from gr.config.inventory import TableConfig
from gr.config.run import EmbeddingsConfig
from gr.embeddings import CANDIDATE_FEATURE, build_tables, local_shards, lookup, pooled_lookup
from gr.errors import ConfigError
from gr.schema import NAMES_OF_TORCH
from tests.support.pooled import PooledTable, build_bags

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
    items = TableConfig(name="item_id", rows=1_000_000_000, dim=stored_dim(50), dtype="fp16", kind="sequence")
    collection = build_tables([items], {"item_id": ("item_id", CANDIDATE_FEATURE)})
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


BAGS = (PooledTable("users", 9, 8, ("user",)), PooledTable("words", 7, 4, ("query", "title"), "mean"))


def test_the_bag_collection_has_the_tables_without_storage() -> None:
    collection = build_bags([PooledTable("big", 10**10, 64, ("x", "y"), "mean"), *BAGS], EmbeddingsConfig())
    big, users, _ = collection.embedding_bag_configs()
    assert (big.name, big.num_embeddings, big.embedding_dim, big.feature_names) == ("big", 10**10, 64, ["x", "y"])
    assert (big.pooling, users.pooling) == (PoolingType.MEAN, PoolingType.SUM)
    assert all(parameter.is_meta for parameter in collection.parameters())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (PooledTable("users", 5, 8, ("z",)), "table users is named more than once"),
        (PooledTable("a.b", 5, 8, ("a.b",)), r"column a\.b: no table may have this name .*; rename it in the data"),
        (PooledTable("type", 5, 8, ("type",)), "column type: no table may have this name"),
        (PooledTable("new", 5, 8, ("title",)), "feature title is named more than once"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_tables_that_cannot_be_are_refused(table: PooledTable, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_bags([*BAGS, table], EmbeddingsConfig())


def test_one_collection_has_tables_of_one_kind() -> None:
    kinds = [TableConfig(name=kind, rows=3, dim=4, kind=kind) for kind in ("pooled", "sequence")]
    with pytest.raises(ConfigError, match="tables of one kind, not pooled, sequence"):
        build_tables(kinds)
    with pytest.raises(ConfigError, match="tables of one kind, not none"):
        build_tables([])


@pytest.mark.parametrize("kind", ["rowwise_adagrad", "adam"], ids=["fused kernel", "dense kernel"])
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "data_parallel"])
def test_pooled_lookup(make_bags: Callable, sharding: str, kind: str) -> None:
    """By name, in any order; an empty bag is a zero vector under sum and mean."""
    config = EmbeddingsConfig.model_validate({"optimizer": {"kind": kind}})
    model = make_bags(BAGS, {"users": sharding, "words": sharding}, config)
    users, words = (shard.weight.clone() for shard in local_shards(model))
    assert (users.shape, words.shape) == ((9, 8), (7, 4))
    lengths = torch.tensor([2, 0, 1, 3, 0, 2])
    ids = torch.tensor([4, 4, 3, 0, 1, 2, 6, 5])
    features = KeyedJaggedTensor(keys=["user", "query", "title"], values=ids, lengths=lengths)
    title, user, query = pooled_lookup(get_unwrapped_module(model).tables, features, ["title", "user", "query"])
    assert torch.allclose(user, torch.stack([2 * users[4], torch.zeros(8)]))
    assert torch.allclose(query, torch.stack([words[3], words[:3].mean(0)]))
    assert torch.allclose(title, torch.stack([torch.zeros(4), words[[6, 5]].mean(0)]))


def test_the_names_that_a_table_cannot_have_are_those_of_torch() -> None:
    modules = torch.nn.ModuleDict()
    names = {name for name in dir(modules) if not name.startswith("_")}
    # transformers adds a method to every module, where another test has imported it.
    foreign = {
        name for name in names if getattr(getattr(modules, name), "__module__", "torch").split(".")[0] != "torch"
    }
    assert names - foreign - NAMES_OF_TORCH == NAMES_OF_TORCH - names == set()
