"""The rows of raw ids: who is given one, what evaluation may do, and what a row that changes hands starts from."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from gr.config.run import EmbeddingsConfig
from gr.dist import World
from gr.embeddings import CANDIDATE_FEATURE, HandedOver, IdMap, InitialRows, TableOptimizer, local_shards, map_ids
from gr.embeddings.dynamic import DynamicTable
from gr.errors import ConfigError
from gr.ops.id_table import EMPTY
from tests.support.pooled import PooledTable

FEATURES = {"item_id": ["item_id", CANDIDATE_FEATURE]}


def embeddings(**ids: object) -> EmbeddingsConfig:
    return EmbeddingsConfig.model_validate({"tables": {"item_id": {"ids": {"rows": 64, **ids}}}})


def id_map(world: World, **ids: object) -> IdMap:
    return IdMap(FEATURES, InitialRows(1, embeddings(**ids)), world)


def history(ids: list[int], candidates: list[int]) -> KeyedJaggedTensor:
    lengths = torch.tensor([len(ids), len(candidates)])
    return KeyedJaggedTensor(FEATURES["item_id"], torch.tensor(ids + candidates), lengths=lengths)


def test_candidates_are_given_no_row(alone: World) -> None:
    ids = id_map(alone, kind="dynamic", ways=8)
    features, (handed,) = ids.train(history([10**15, 7, 7], [7, 8, 9]), 0)
    rows = features.values().tolist()
    assert sorted(handed.id_N.tolist()) == [7, 10**15]
    assert rows[1] == rows[2] == rows[3]
    assert all(row % 8 == 0 for row in rows[4:])
    assert ids.read_counts() == {
        "item_id/hits": 0,
        "item_id/admitted": 2,
        "item_id/evicted": 0,
        "item_id/shared": 0,
    }


def test_evaluation_only_reads(alone: World) -> None:
    ids = id_map(alone, kind="dynamic", ways=8)
    trained, _ = ids.train(history([5, 6], [5]), 0)
    before = ids.dynamic["item_id"].table.key_SA.clone()
    read = ids.find(history([5, 77], []))
    assert read.values()[0] == trained.values()[0]
    assert torch.equal(ids.dynamic["item_id"].table.key_SA, before)
    assert ids.read_lookups() == {"item_id/ids": 2, "item_id/shared": 1}


def test_hashed_rows_are_a_function_of_the_id(alone: World) -> None:
    ids = id_map(alone, kind="hashed")
    features, handed = ids.train(history([2**62, 5, 5], [5]), 0)
    assert not handed
    assert torch.equal(features.values(), ids.find(history([2**62, 5, 5], [5])).values())
    assert features.values()[1] == features.values()[3]
    assert (features.values() < 64).all()


def test_a_step_of_no_ids(alone: World) -> None:
    features, (handed,) = id_map(alone, kind="dynamic").train(history([], []), 0)
    assert not len(features.values())
    assert not len(handed.row_N)


def test_lfu_forgets_at_the_same_rate_in_every_unit(alone: World) -> None:
    """Two ids of a set for one row: one used 3 times, then the other twice, many half-lives on and one half-life
    apart.
    """
    for start in (0, 127, 128, 1000):
        config = embeddings(kind="dynamic", rows=2, ways=2, eviction="lfu", half_life=1).ids_of("item_id")
        table = DynamicTable("item_id", config, alone)
        table.use(torch.tensor([1]), torch.tensor([3]), start)
        assert table.use(torch.tensor([2]), torch.tensor([1]), start + 1)[1].tolist() == []
        assert table.use(torch.tensor([2]), torch.tensor([1]), start + 2)[1].tolist() == [0]


def test_counts_of_ids_without_a_row_halve(alone: World) -> None:
    config = embeddings(kind="dynamic", rows=8, ways=8, half_life=2, min_count=3).ids_of("item_id")
    table = DynamicTable("item_id", config, alone)
    admitted = [len(table.use(torch.tensor([1]), torch.tensor([1]), step)[1]) for step in (0, 1, 2, 3)]
    assert admitted == [0, 0, 0, 1], "2 uses are 1 at the first half-life"


def test_another_run_begins_with_ids_that_give_way(alone: World) -> None:
    ids = id_map(alone, kind="dynamic", rows=2, ways=2)
    ids.train(history([5], []), 999)
    ids.set_steps(0)
    _, (handed,) = ids.train(history([6], []), 0)
    assert handed.id_N.tolist() == [6]


def test_refuses_more_ranks_than_sets(alone: World) -> None:
    with pytest.raises(ConfigError, match=r"rows=64 in ways of 64 are 1 sets; the 2 ranks"):
        IdMap(FEATURES, InitialRows(1, embeddings(kind="dynamic")), World(0, 2, 0, 2, alone.device))


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad", "adam", "rowwise_adamw"])
@pytest.mark.parametrize("sharding", ["row_wise", "data_parallel"])
def test_a_row_that_changes_hands_starts_afresh(
    make_bags: Callable[..., nn.Module], alone: World, kind: str, sharding: str
) -> None:
    config = EmbeddingsConfig.model_validate(
        {"optimizer": {"kind": kind}, "tables": {"t": {"ids": {"kind": "dynamic", "rows": 12, "ways": 4}}}}
    )
    model = make_bags([PooledTable("t", 12, 4, ("t",))], {"t": sharding}, config)
    map_ids(model, InitialRows(1, config), alone)
    optimizer = TableOptimizer(model, config, seed=1)
    (shard,) = local_shards(model)
    for state in optimizer.states[0].values():
        state.fill_(3)
    before, ids = shard.weight.clone(), torch.tensor([2**40, 17])
    optimizer.hand_over([HandedOver("t", torch.tensor([9, 2]), ids), HandedOver("u", torch.tensor([1]), ids[:1])])
    others = torch.tensor([row not in (2, 9) for row in range(12)])
    assert torch.equal(shard.weight[others], before[others])
    expected = InitialRows(1, config).of_ids(shard, ids).float()
    torch.testing.assert_close(shard.weight[[9, 2]], expected)
    assert not torch.equal(expected[0], expected[1])
    for state in optimizer.states[0].values():
        assert not state[[2, 9]].any()
        assert (state[others] == 3).all()


def test_rows_are_in_the_checkpoint_by_sets(make_bags: Callable[..., nn.Module], alone: World) -> None:
    config = EmbeddingsConfig.model_validate(
        {"tables": {"t": {"ids": {"kind": "dynamic", "rows": 12, "ways": 4, "min_count": 2}}}}
    )
    model = make_bags([PooledTable("t", 12, 4, ("t",))], {"t": "row_wise"}, config)
    map_ids(model, InitialRows(1, config), alone)
    sizes = {each.name: tuple(each.value.size()) for each in TableOptimizer(model, config, seed=1).entries()}
    assert {name: sizes[f"t/ids.{name}"] for name in ("raw_id", "score", "seen")} == {
        "raw_id": (3, 4),
        "score": (3, 4),
        "seen": (3, 12),
    }
    shard = model.module.tables.id_map.dynamic["t"].table
    assert (shard.key_SA == EMPTY).all()
