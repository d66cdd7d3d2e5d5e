"""Tables sharded over this process alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)

from gr.config.retrieval import RetrievalConfig
from gr.config.run import EmbeddingsConfig
from gr.dist import World
from gr.embeddings import PooledTable, build_bag_collection, build_collection, initialise_tables, shard_tables
from gr.embeddings.optimizers import compute_kernel
from gr.planner.for_run import make_plan
from gr.planner.inventory import retrieval_inventory
from tests.support.tiny import tiny_config

ROWS = 12


class Holder(nn.Module):
    """A model that is nothing but its tables."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        self.tables = build_collection(ROWS, config.model.dim, config.embeddings)


@pytest.fixture
def make_table(alone: World) -> Callable[..., nn.Module]:
    """make_table(dim=..., sharding=..., dtype=..., **optimizer): the sharded and filled model."""

    def make(*, dim: int = 8, sharding: str = "row_wise", dtype: str = "fp32", **optimizer: object) -> nn.Module:
        config = tiny_config(
            Path("unused"),
            Path("unused"),
            model={"dim": dim},
            planner={"sharding": sharding},
            embeddings={"dtype": dtype, "optimizer": optimizer or {"kind": "sgd"}},
        )
        with torch.device("meta"):
            model = Holder(config)
        _, sharding_plan = make_plan(model, retrieval_inventory(config, ROWS), config, alone)
        sharded = shard_tables(model, sharding_plan, config.embeddings, alone.device)
        initialise_tables(sharded, seed=1, std=0.02, dim=dim)
        return sharded

    return make


class Bags(nn.Module):
    """A model that is nothing but pooled tables."""

    def __init__(self, tables: Sequence[PooledTable], config: EmbeddingsConfig) -> None:
        super().__init__()
        self.tables = build_bag_collection(tables, config)


@pytest.fixture
def make_bags(alone: World) -> Callable[..., nn.Module]:
    """make_bags(tables, {table: sharding type}, config): the sharded and filled model, under fused or dense kernels."""

    def make(
        tables: Sequence[PooledTable], shardings: Mapping[str, str], config: EmbeddingsConfig | None = None
    ) -> nn.Module:
        config = config or EmbeddingsConfig.model_validate({"optimizer": {"kind": "sgd"}})
        model = Bags(tables, config)
        plan = {
            table.name: ParameterSharding(
                shardings[table.name],
                compute_kernel(config.optimizer, alone.device, shardings[table.name]),
                [0],
                EnumerableShardingSpec([ShardMetadata([0, 0], [table.rows, table.dim], "rank:0/cpu")]),
            )
            for table in tables
        }
        whole = ShardingPlan({"tables": EmbeddingModuleShardingPlan(plan)})
        sharded = shard_tables(model, whole, config, alone.device)
        initialise_tables(sharded, seed=1, std=config.init_std, dim=4, init=config.init)
        return sharded

    return make
