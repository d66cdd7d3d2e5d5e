"""TorchRec's own planner in benchmarks/: plans from the same inventory and constraints as ours."""

from pathlib import Path

import pytest
import torch
from torchrec.distributed.types import ParameterSharding

from benchmarks.torchrec_planner import torchrec_plan
from gr.errors import PlanError
from gr.models import build_model
from gr.planner.constraints import constrained
from tests.support.schemas import item_schema
from tests.support.tiny import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TYPES = ("table_wise", "row_wise", "column_wise", "data_parallel")


def planned(
    *, optimizer: str = "adam", rows: int = 30, world_size: int = 2, device: torch.device = CPU, **planner: object
) -> ParameterSharding:
    unused = Path("unused")
    config = tiny_config(unused, unused, embeddings={"optimizer": {"kind": optimizer}}, planner=planner)
    schema = item_schema(rows)
    plan = torchrec_plan(
        build_model(config, schema),
        constrained(config.inventory(schema), config.planner, device.type),
        config.embeddings,
        world_size=world_size,
        local_size=world_size,
        device=device,
    ).plan
    assert list(plan["tables"]) == ["item_id"]
    return plan["tables"]["item_id"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("optimizer", ["adam", "partial_rowwise_adam", "rowwise_adagrad", "sgd"])
def test_it_chooses_for_every_optimizer(optimizer: str, world_size: int) -> None:
    sharding = planned(optimizer=optimizer, world_size=world_size)
    assert sharding.sharding_type in TYPES
    dense = "adam" in optimizer or sharding.sharding_type == "data_parallel"
    assert sharding.compute_kernel == ("dense" if dense else "fused")
    assert planned(optimizer=optimizer, world_size=world_size) == sharding, "every rank makes its own"


@pytest.mark.parametrize("sharding_type", TYPES)
def test_the_type_of_the_configuration(sharding_type: str) -> None:
    assert planned(sharding=sharding_type, optimizer="sgd").sharding_type == sharding_type


def test_on_cuda_every_optimizer_is_fused() -> None:
    sharding = planned(sharding="row_wise", device=CUDA)
    assert sharding.compute_kernel == "fused"
    assert str(sharding.sharding_spec.shards[-1].placement).endswith("cuda:1")


def test_a_table_that_fits_nowhere() -> None:
    """10^12 rows of 8 columns."""
    with pytest.raises(PlanError, match="TorchRec's planner found no plan for 2 ranks"):
        planned(optimizer="rowwise_adagrad", rows=10**12)
