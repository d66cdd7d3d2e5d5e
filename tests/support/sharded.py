"""Fixtures: tables sharded over this process alone."""

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
from gr.embeddings import CANDIDATE_FEATURE, build_tables, initialise_tables
from gr.parallel.tables import shard_tables
from gr.planner.for_run import make_plan
from tests.support.pooled import PooledTable, build_bags, compute_kernel
from tests.support.schemas import item_schema
from tests.support.tiny import tiny_config

ROWS = 12
SCHEMA = item_schema(ROWS)


class Holder(nn.Module):
    """A model that is nothing but its tables."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        self.tables = build_tables(config.tables(SCHEMA), {"item_id": ("item_id", CANDIDATE_FEATURE)})


@pytest.fixture
def make_table(alone: World) -> Callable[..., nn.Module]:
    """make_table(dim=..., sharding=..., dtype=..., rounding=..., **optimizer): the sharded and filled model."""

    def make(
        *,
        dim: int = 8,
        sharding: str = "row_wise",
        dtype: str = "fp32",
        rounding: str = "stochastic",
        **optimizer: object,
    ) -> nn.Module:
        config = tiny_config(
            Path("unused"),
            Path("unused"),
            model={"dim": dim},
            planner={"sharding": sharding, "allow_state_per_shard": True},
            embeddings={"dtype": dtype, "rounding": rounding, "optimizer": optimizer or {"kind": "sgd"}},
        )
        with torch.device("meta"):
            model = Holder(config)
        _, sharding_plan = make_plan(model, config.inventory(SCHEMA), config, alone)
        sharded = shard_tables(model, sharding_plan, config.embeddings, alone.device)
        initialise_tables(sharded, seed=1, embeddings=config.embeddings, dim=dim)
        return sharded

    return make


class Bags(nn.Module):
    """A model that is nothing but pooled tables."""

    def __init__(self, tables: Sequence[PooledTable], config: EmbeddingsConfig) -> None:
        super().__init__()
        self.tables = build_bags(tables, config)


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
        initialise_tables(sharded, seed=1, embeddings=config, dim=4)
        return sharded

    return make
