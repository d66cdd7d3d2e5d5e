"""The plan of a run: what planner.* asks for, what auto may choose, the machine, and a plan that was given."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torchrec.distributed.types import ParameterSharding

from gr.config.retrieval import RetrievalConfig
from gr.dist import World
from gr.errors import ConfigError, GRError, PlanError
from gr.models import build_model
from gr.planner.constraints import constrained
from gr.planner.for_run import make_plan, run_topology
from gr.planner.placement import Plan
from gr.planner.planfile import dump_plan
from tests.support.schemas import item_schema
from tests.support.tiny import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TYPES = ("table_wise", "row_wise", "column_wise", "data_parallel")


@dataclass(frozen=True)
class OneOfMany(World):
    """A rank that hears what the main rank would have sent."""

    sent: str = ""

    def from_main(self, text: str) -> str:
        return text if self.is_main else self.sent


def world_of(size: int, device: torch.device = CPU) -> World:
    return OneOfMany(0, size, 0, size, device)


def configured(*, dim: int = 8, optimizer: str = "adam", **planner: object) -> RetrievalConfig:
    return tiny_config(
        Path("unused"),
        Path("unused"),
        model={"dim": dim},
        embeddings={"optimizer": {"kind": optimizer}},
        planner={"allow_state_per_shard": True, **planner},
    )


def planned(config: RetrievalConfig, world: World, *, rows: int = 30) -> tuple[Plan, ParameterSharding]:
    plan, sharding = make_plan(
        build_model(config, item_schema(rows)), config.inventory(item_schema(rows)), config, world
    )
    assert list(sharding.plan) == ["tables"] and list(sharding.plan["tables"]) == ["item_id"]
    return plan, sharding.plan["tables"]["item_id"]


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
        _, got = planned(config, world_of(2))
        assert got.sharding_type == sharding
        dense = optimizer == "adam" or sharding == "data_parallel"
        assert got.compute_kernel == ("dense" if dense else "fused")
        if sharding == "data_parallel":
            assert got.sharding_spec is None and got.ranks == [0, 1]
        else:
            assert (times_held(got, 30, 8) == 1).all()
            assert sorted(got.ranks) == [0, 1] if sharding != "table_wise" else len(got.ranks) == 1


@pytest.mark.parametrize(
    ("optimizer", "allowed"),
    [
        ("adam", ("table_wise", "row_wise", "column_wise", "data_parallel")),
        ("rowwise_adamw", ("table_wise", "row_wise", "data_parallel")),
        ("rowwise_adagrad", ("table_wise", "row_wise", "data_parallel")),
        ("adagrad", ("table_wise", "row_wise", "column_wise", "data_parallel")),
        ("sgd", ("table_wise", "row_wise", "column_wise", "data_parallel")),
    ],
)
def test_auto_may_not_change_what_is_trained(optimizer: str, allowed: tuple[str, ...]) -> None:
    config = configured(optimizer=optimizer)
    (table,) = constrained(config.inventory(item_schema(30)), config.planner, "cpu").tables
    assert table.sharding_types == allowed
    assert table.kernels == (("dense",) if "adam" in optimizer else ("fused",))
    _, got = planned(configured(optimizer=optimizer), world_of(2))
    assert got.sharding_type in allowed


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "partial_rowwise_adam"])
@pytest.mark.parametrize("planner", [{"sharding": "column_wise"}, {"tables": {"item_id": "column_wise"}}])
def test_column_shards_of_an_optimizer_with_one_number_a_row_are_asked_for_twice(
    tmp_path: Path, optimizer: str, planner: dict
) -> None:
    refusal = (
        f"planner: column_wise of item_id: {optimizer} keeps one number a row .* planner.allow_state_per_shard=true"
    )
    with pytest.raises(ConfigError, match=refusal):
        planned(configured(optimizer=optimizer, allow_state_per_shard=False, **planner), world_of(2))
    plan, _ = planned(configured(optimizer=optimizer, **planner), world_of(2))
    (written := tmp_path / "plan.json").write_text(dump_plan(plan))
    given = {"plan": str(written), "allow_state_per_shard": False}
    with pytest.raises(GRError, match=refusal):  # a plan is no way round it
        planned(configured(optimizer=optimizer, **given), world_of(2))
    planned(configured(optimizer="adagrad", allow_state_per_shard=False, **planner), world_of(2))


def test_on_cuda_every_optimizer_is_fused() -> None:
    """A plan for GPUs can be made on a machine without one."""
    for planner in ({"sharding": "table_wise"}, {"sharding": "row_wise"}):
        plan, got = planned(configured(topology="h100", **planner), world_of(2, CUDA))
        assert got.compute_kernel == "fused"
        assert str(got.sharding_spec.shards[-1].placement).endswith(f"cuda:{got.ranks[-1]}")
        assert (plan.topology.ranks, plan.topology.ranks_per_host) == (2, 2), "the run's, not the hardware's"


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(
    st.sampled_from([*TYPES, "auto"]),
    st.integers(1, 8),
    st.integers(2, 40),
    st.integers(1, 40),
    st.sampled_from(["adam", "rowwise_adagrad", "sgd"]),
)
def test_every_element_is_held_once(sharding: str, world_size: int, rows: int, dim: int, optimizer: str) -> None:
    """It holds with fewer rows, or fewer blocks of four columns, than ranks too."""
    if sharding == "row_wise" and optimizer != "adam":  # fused on CPU, where every shard needs a row
        height = -(-rows // world_size)
        assume(-(-rows // height) == world_size)
    _, got = planned(configured(sharding=sharding, dim=dim, optimizer=optimizer), world_of(world_size), rows=rows)
    assert got.ranks is not None and set(got.ranks) <= set(range(world_size))
    if got.sharding_spec is None:
        assert got.sharding_type == "data_parallel" and got.ranks == list(range(world_size))
        return
    assert (times_held(got, rows, -(-dim // 4) * 4) == 1).all()
    assert [shard.placement.rank() for shard in got.sharding_spec.shards] == got.ranks


def test_every_rank_has_the_main_ranks_plan() -> None:
    config = configured(dim=64)
    plan, sharding = planned(config, world_of(4), rows=5000)
    others = OneOfMany(3, 4, 3, 4, CPU, sent=dump_plan(plan))
    assert planned(config, others, rows=5000) == (plan, sharding)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_table_that_the_model_has_not(device: torch.device) -> None:
    with pytest.raises(ConfigError) as refusal:
        planned(configured(tables={"item": "row_wise", "item_id": "row_wise"}), world_of(1, device))
    assert str(refusal.value) == "planner.tables: no table named item; the model has item_id"


def test_a_table_that_fits_nowhere_is_refused_on_every_rank() -> None:
    """10^12 rows of 8 columns: the main rank finds out, and tells the others."""
    sent: list[str] = []

    class Telling(OneOfMany):
        def from_main(self, text: str) -> str:
            sent.append(text)
            return text

    config = configured(optimizer="rowwise_adagrad")
    with pytest.raises(PlanError) as refusal:
        planned(config, Telling(0, 2, 0, 2, CPU), rows=10**12)
    with pytest.raises(PlanError) as relayed:
        planned(config, OneOfMany(1, 2, 1, 2, CPU, sent=sent[0]), rows=10**12)
    assert len(sent) == 1 and str(relayed.value) == str(refusal.value) != ""


@pytest.fixture
def given_plan(tmp_path: Path) -> Callable[..., RetrievalConfig]:
    """given_plan(...): a configuration with the plan of a row_wise run on 2 ranks."""
    plan, _ = planned(configured(sharding="row_wise"), world_of(2))
    (tmp_path / "plan.json").write_text(dump_plan(plan))

    def configuration(**options) -> RetrievalConfig:
        return configured(plan=str(tmp_path / "plan.json"), **options)

    return configuration


def test_a_plan_that_was_given(given_plan: Callable[..., RetrievalConfig]) -> None:
    """It holds where auto could not have chosen the plan, and where the configuration requires the same type."""
    for config in (given_plan(), given_plan(sharding="row_wise"), given_plan(tables={"item_id": "row_wise"})):
        _, got = planned(config, world_of(2))
        assert got.sharding_type == "row_wise" and got.ranks == [0, 1]


@pytest.mark.parametrize(
    ("options", "size", "rows"),
    [
        ({"dim": 16}, 2, 30),
        ({"optimizer": "sgd"}, 2, 30),
        ({}, 2, 31),
        ({}, 4, 30),
    ],
    ids=["width", "optimizer", "rows", "ranks"],
)
def test_a_plan_for_something_else(
    given_plan: Callable[..., RetrievalConfig], options: dict, size: int, rows: int
) -> None:
    with pytest.raises(PlanError):
        planned(given_plan(**options), world_of(size), rows=rows)


def test_a_plan_that_is_not_what_the_configuration_asks_for(given_plan: Callable[..., RetrievalConfig]) -> None:
    with pytest.raises(PlanError, match="item_id is row_wise there, and the configuration asks for table_wise"):
        planned(given_plan(sharding="table_wise"), world_of(2))


def test_no_plan_there() -> None:
    with pytest.raises(GRError, match=r"nowhere/plan\.json"):
        planned(configured(plan="nowhere/plan.json"), world_of(2))


@pytest.mark.parametrize(
    ("gpu", "name"), [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100-40g"), ("NVIDIA H200", "h200")]
)
def test_the_gpu_names_the_hardware(gpu: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    topology = run_topology(None, OneOfMany(0, 6, 0, 3, CUDA))
    assert (topology.name, topology.ranks, topology.hosts) == (name, 6, 2)


def test_wrong_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    with pytest.raises(ConfigError, match=r"planner\.topology is unset and .* no figures for a 'NVIDIA H100 PCIe'"):
        run_topology(None, world_of(2, CUDA))
    with pytest.raises(
        ConfigError, match=r"planner\.topology=h100 is for cuda, and the run is on cpu: set another one"
    ):
        run_topology("h100", world_of(2))
    with pytest.raises(PlanError, match="h1000"):
        run_topology("h1000", world_of(2, CUDA))
