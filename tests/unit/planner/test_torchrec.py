"""Plans: every sharding type, the planner's choice, and that each element of a table is held exactly once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrec.distributed.types import ParameterSharding

from gr.config.tree import ExperimentConfig
from gr.errors import ConfigError, PlanError
from gr.experiment import meta_model
from gr.planner import make_plan
from tests.support.tiny import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TYPES = ("table_wise", "row_wise", "column_wise", "data_parallel")


def configured(*, dim: int = 8, optimizer: str = "adam", **planner: object) -> ExperimentConfig:
    return tiny_config(
        Path("unused"),
        Path("unused"),
        model={"dim": dim},
        embeddings={"optimizer": {"kind": optimizer}},
        planner=planner,
    )


def planned(config: ExperimentConfig, *, rows: int = 30, world_size: int = 2, device=CPU) -> ParameterSharding:
    model = meta_model(config, rows)
    plan = make_plan(model, config, world_size=world_size, local_size=world_size, device=device)
    assert list(plan.plan) == ["tables"] and list(plan.plan["tables"]) == ["item_id"]
    return plan.plan["tables"]["item_id"]


def times_held(sharding: ParameterSharding, rows: int, columns: int) -> np.ndarray:
    """int [rows, columns]: how many shards hold each element."""
    held = np.zeros((rows, columns), dtype=int)
    for shard in sharding.sharding_spec.shards:
        (row, column), (height, width) = shard.shard_offsets, shard.shard_sizes
        assert row >= 0 and column >= 0 and row + height <= rows and column + width <= columns
        assert width % 4 == 0, "fbgemm takes rows of a multiple of 4 elements"
        held[row : row + height, column : column + width] += 1
    return held


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
@pytest.mark.parametrize("sharding", TYPES)
def test_the_type_that_was_asked_for(sharding: str, optimizer: str) -> None:
    for config in (
        configured(sharding=sharding, optimizer=optimizer),
        configured(tables={"item_id": sharding}, optimizer=optimizer),
        configured(sharding="row_wise", tables={"item_id": sharding}, optimizer=optimizer),
    ):
        got = planned(config)
        assert got.sharding_type == sharding
        dense = optimizer == "adam" or sharding == "data_parallel"
        assert got.compute_kernel == ("dense" if dense else "fused")
        if sharding == "data_parallel":
            assert got.sharding_spec is None and got.ranks == [0, 1]
        else:
            assert (times_held(got, 30, 8) == 1).all()
            assert got.ranks == ([0] if sharding == "table_wise" else [0, 1])


@pytest.mark.parametrize("optimizer", ["adam", "partial_rowwise_adam", "rowwise_adagrad", "sgd"])
def test_the_planner_chooses_for_every_optimizer(optimizer: str) -> None:
    """The defaults, on two CPU ranks. TorchRec's planner knows no dense kernel for these types, but runs them."""
    got = planned(configured(optimizer=optimizer))
    assert got.sharding_type in ("table_wise", "row_wise", "column_wise")
    assert got.compute_kernel == ("dense" if "adam" in optimizer else "fused")


def test_on_cuda_every_optimizer_is_fused() -> None:
    """A plan for GPUs can be made on a machine without one."""
    for config in (configured(), configured(sharding="row_wise")):
        got = planned(config, device=CUDA)
        assert got.compute_kernel == "fused"
        assert str(got.sharding_spec.shards[-1].placement).endswith("cuda:1")


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=60)
@given(
    st.sampled_from([*TYPES, "auto"]),
    st.integers(1, 8),
    st.integers(2, 40),
    st.integers(1, 40),
    st.sampled_from(["adam", "rowwise_adagrad"]),
)
def test_every_element_is_held_once(sharding: str, world_size: int, rows: int, dim: int, optimizer: str) -> None:
    """Also with fewer rows, or fewer blocks of four columns, than ranks."""
    config = configured(sharding=sharding, dim=dim, optimizer=optimizer)
    got = planned(config, rows=rows, world_size=world_size)
    assert got.ranks is not None and set(got.ranks) <= set(range(world_size))
    if got.sharding_spec is None:
        assert sharding == "data_parallel" and got.ranks == list(range(world_size))
        return
    columns = -(-dim // 4) * 4
    assert (times_held(got, rows, columns) == 1).all()
    placed = [shard.placement.rank() for shard in got.sharding_spec.shards]
    assert placed == got.ranks


def test_ranks_agree() -> None:
    """Each makes its own plan, and none is sent around."""
    config = configured(dim=64)
    assert planned(config, rows=5000, world_size=4) == planned(config, rows=5000, world_size=4)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_table_that_the_model_has_not(world_size: int) -> None:
    with pytest.raises(ConfigError) as refusal:
        planned(configured(tables={"item": "row_wise", "item_id": "row_wise"}), world_size=world_size)
    assert str(refusal.value) == "planner.tables: no table named item; the model has item_id"


def test_a_table_that_fits_nowhere() -> None:
    """10^13 rows of 8 columns."""
    with pytest.raises(PlanError, match="TorchRec's planner found no plan for 2 ranks"):
        planned(configured(optimizer="rowwise_adagrad"), rows=10**13)
