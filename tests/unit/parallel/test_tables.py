"""What is refused before anything is sharded, and what TorchRec's planner is offered."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchrec.distributed.types import ShardingPlan

from gr.config.inventory import SHARDING_TYPES, TableConfig
from gr.config.run import EmbeddingsConfig
from gr.errors import ConfigError, PlanError
from gr.parallel.tables import _refuse_shards_without_rows, pooled_sharder, shard_tables
from gr.planner.placement import Placement
from gr.planner.sharding_plan import to_sharding_plan
from tests.support.plans import hand_made, machine
from tests.support.pooled import PooledTable, build_bags

TABLES = (PooledTable("sums", 9, 8, ("a",)), PooledTable("means", 7, 8, ("b",), "mean"))


def test_means_under_grid_shard_are_refused(make_bags: Callable) -> None:
    with pytest.raises(
        PlanError, match=r"table means: grid_shard is not valid for a pooled table of means.*table_row_wise"
    ):
        make_bags(TABLES, {"sums": "table_wise", "means": "grid_shard"})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_sharding_type_is_offered(device: str) -> None:
    assert set(pooled_sharder(EmbeddingsConfig()).sharding_types(device)) == set(SHARDING_TYPES)


class Bags(nn.Module):
    def __init__(self, tables: list[PooledTable], config: EmbeddingsConfig) -> None:
        super().__init__()
        self.tables = build_bags(tables, config)


def sharding_plan(kernel: str, rows: dict[str, int], pooling: str) -> tuple[Bags, EmbeddingsConfig, ShardingPlan]:
    """Tables by rows over four ranks, `small` among them; the last has `pooling`, the others sums."""
    config = EmbeddingsConfig.model_validate({"optimizer": {"kind": "sgd"}})
    tables = [PooledTable(name, count, 8, (f"f_{name}",), "sum") for name, count in rows.items()]
    tables[-1] = PooledTable(tables[-1].name, tables[-1].rows, 8, tables[-1].features, pooling)
    model = Bags(tables, config)
    inventory = [
        TableConfig(name=t.name, rows=t.rows, dim=8, optimizer="sgd", pooling=t.pooling, kernels=(kernel,))
        for t in tables
    ]
    placements = [Placement(t.name, "row_wise", kernel, (0, 1, 2, 3)) for t in tables]
    plan = to_sharding_plan(hand_made(inventory, placements, machine(4)), model, torch.device("cpu"))
    return model, config, plan


@pytest.mark.parametrize(("rows", "pooling"), [({"small": 2}, "sum"), ({"big": 99, "small": 2}, "mean")], ids=str)
def test_a_fused_kernel_without_rows_is_refused_on_cpu(rows: dict[str, int], pooling: str) -> None:
    """Before any rank makes a collective; sums and means are not in one kernel."""
    model, config, plan = sharding_plan("fused", rows, pooling)
    with pytest.raises(PlanError, match=r"table small: row_wise leaves rank 2 without a row.*table_wise"):
        shard_tables(model, plan, config, torch.device("cpu"))


@pytest.mark.parametrize(("kernel", "rows"), [("fused", {"big": 99, "small": 4}), ("dense", {"small": 2})], ids=str)
def test_other_kernels_are_not(kernel: str, rows: dict[str, int]) -> None:
    """How they train: tests/distributed/test_pooled_parity.py."""
    model, _, plan = sharding_plan(kernel, rows, "sum")
    _refuse_shards_without_rows(model, plan)


def test_dynamic_ids_are_refused_where_a_cache_would_not_see_them() -> None:
    model, _, plan = sharding_plan("fused", {"big": 99}, "sum")
    plan.plan["tables"]["big"].compute_kernel = "fused_uvm_caching"
    ids = {"big": {"ids": {"kind": "dynamic", "rows": 99, "ways": 9}}}
    config = EmbeddingsConfig.model_validate({"optimizer": {"kind": "sgd"}, "tables": ids})
    with pytest.raises(ConfigError, match=r"tables\.big: dynamic ids have no fused_uvm_caching: take"):
        shard_tables(model, plan, config, torch.device("cpu"))
