"""planner.name=torchrec: plans of TorchRec's own planner, from the same inventory and constraints as ours."""

from pathlib import Path

import pytest
import torch
from gr.experiment.retrieval import meta_model
from torchrec.distributed.types import ParameterSharding

from gr.config.retrieval import RetrievalConfig
from gr.dist import World
from gr.errors import PlanError
from gr.planner.for_run import make_plan
from gr.planner.inventory import retrieval_inventory
from tests.support.tiny import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TYPES = ("table_wise", "row_wise", "column_wise", "data_parallel")


def planned(
    *, optimizer: str = "adam", rows: int = 30, world_size: int = 2, device: torch.device = CPU, **planner: object
) -> ParameterSharding:
    config: RetrievalConfig = tiny_config(
        Path("unused"),
        Path("unused"),
        embeddings={"optimizer": {"kind": optimizer}},
        planner={"name": "torchrec", **planner},
    )
    world = World(0, world_size, 0, world_size, device)
    plan, sharding = make_plan(meta_model(config, rows), retrieval_inventory(config, rows), config, world)
    assert plan is None and list(sharding.plan["tables"]) == ["item_id"]
    return sharding.plan["tables"]["item_id"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("optimizer", ["adam", "partial_rowwise_adam", "rowwise_adagrad", "sgd"])
def test_it_chooses_for_every_optimizer(optimizer: str, world_size: int) -> None:
    """TorchRec's planner knows no dense kernel for most types, but TorchRec runs them."""
    got = planned(optimizer=optimizer, world_size=world_size)
    assert got.sharding_type in TYPES
    dense = "adam" in optimizer or got.sharding_type == "data_parallel"
    assert got.compute_kernel == ("dense" if dense else "fused")
    assert planned(optimizer=optimizer, world_size=world_size) == got, "every rank makes its own"


@pytest.mark.parametrize("sharding", TYPES)
def test_the_type_that_was_asked_for(sharding: str) -> None:
    assert planned(sharding=sharding, optimizer="sgd").sharding_type == sharding


def test_on_cuda_every_optimizer_is_fused() -> None:
    got = planned(sharding="row_wise", device=CUDA)
    assert got.compute_kernel == "fused" and str(got.sharding_spec.shards[-1].placement).endswith("cuda:1")


def test_a_table_that_fits_nowhere() -> None:
    """10^13 rows of 8 columns."""
    with pytest.raises(PlanError, match="TorchRec's planner found no plan for 2 ranks"):
        planned(optimizer="rowwise_adagrad", rows=10**13)
