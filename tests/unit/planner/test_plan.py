"""Plans of any inventory: whole tables, within memory and constraints, the same every time."""

import os
import subprocess
import sys
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gr.config.inventory import SEQUENCE_TYPES, SHARDING_TYPES, GivenDense, InventoryConfig, TableConfig
from gr.errors import PlanError
from gr.planner.enumerate import KERNELS
from gr.planner.estimate import MEMORY, estimate
from gr.planner.estimate_tables import table_bytes
from gr.planner.memory import fixed_memory
from gr.planner.placement import Plan, column_blocks, shards
from gr.planner.plan import search, table_capacity
from gr.planner.planfile import differences, dump_plan, parse_plan, placement_fault
from gr.planner.report import page, summary
from gr.planner.solve import DoesNotFit
from gr.planner.topology import Topology
from tests.support.plans import machine

MACHINES = st.sampled_from([(1, 1), (2, 2), (2, 1), (3, 3), (4, 4), (4, 2), (6, 2), (8, 4)])
AGAIN = """
import sys
from gr.planner.planfile import dump_plan, parse_plan
from gr.planner.plan import search
plan = parse_plan(sys.stdin.read())
print(dump_plan(search(plan.inventory, plan.topology)), end="")
"""


def described(**fields: object) -> TableConfig:
    return TableConfig.model_validate({"name": "t", "rows": 1000, "dim": 16, **fields})


def busy() -> tuple[InventoryConfig, Topology]:
    """Enough unlike tables that the order of a set or dict would show."""
    tables = tuple(
        described(
            name=f"table-{i}",
            rows=10 ** (2 + i % 5),
            dim=8 * (1 + i % 7),
            ids_per_example=1.0 + i % 11,
            skew=0.1 * (i % 13),
            kind="sequence" if i % 3 == 0 else "pooled",
        )
        for i in range(24)
    )
    return InventoryConfig(rank_batch_size=256, tables=tables), replace(machine(16, 4), hbm_bytes=6 * 10**7)


@st.composite
def tables(draw: st.DrawFn, name: str, ranks: int) -> TableConfig:
    kind = draw(st.sampled_from(["pooled", "sequence"]))
    exist = list(SEQUENCE_TYPES if kind == "sequence" else SHARDING_TYPES)
    fewest = draw(st.integers(1, ranks))
    pinned = st.lists(st.integers(0, ranks - 1), min_size=1, max_size=ranks, unique=True).map(tuple)
    types = draw(st.none() | st.lists(st.sampled_from(exist), min_size=1, max_size=3, unique=True).map(tuple))
    return described(
        name=name,
        rows=draw(st.sampled_from([1, 2, 3, 5, 10, 40, 1000, 10**5])),
        dim=draw(st.sampled_from([4, 8, 12, 20, 32, 64])),
        dtype=draw(st.sampled_from(["fp32", "fp16", "bf16"])),
        kind=kind,
        pooling="sum" if types and "grid_shard" in types else draw(st.sampled_from(["sum", "mean"])),
        ids_per_example=draw(st.sampled_from([0.3, 1.0, 20.0])),
        ids_per_step=draw(st.sampled_from([0.0, 100.0])),
        skew=draw(st.sampled_from([0.0, 0.5, 1.05, 3.0])),
        optimizer=draw(st.sampled_from(["adam", "partial_rowwise_adam", "rowwise_adagrad", "adagrad", "sgd"])),
        sharding_types=types,
        kernels=draw(st.sampled_from([("fused",), ("fused", "fused_uvm"), KERNELS[1:], ("dense",)])),
        cache_load_factor=draw(st.sampled_from([0.1, 0.25, 1.0])),
        ranks=draw(st.none() | st.none() | pinned),
        min_shards=draw(st.sampled_from([1, 1, fewest])),
        max_shards=draw(st.sampled_from([None, None, ranks])),
    )


@st.composite
def jobs(draw: st.DrawFn) -> tuple[InventoryConfig, Topology]:
    topology = machine(*draw(MACHINES), draw(st.sampled_from(["cpu", "cuda"])))
    inventory = InventoryConfig(
        rank_batch_size=draw(st.sampled_from([1, 16, 256])),
        index_dedup=draw(st.booleans()),
        dense=GivenDense(parameters=draw(st.sampled_from([0, 10_000]))),
        tables=tuple(draw(tables(f"t{i}", topology.ranks)) for i in range(draw(st.integers(1, 5)))),
    )
    hbm, host = draw(st.floats(4.5, 9)), draw(st.floats(3, 9))
    return inventory, replace(topology, hbm_bytes=int(10**hbm), host_bytes=int(10**host))


def planned(inventory: InventoryConfig, topology: Topology) -> Plan | None:
    try:
        # A table that fits any constraint beside the drawn ones, which may exclude one another.
        return search(inventory.model_copy(update={"tables": (*inventory.tables, described(name="free"))}), topology)
    except PlanError:
        return None


class TestAnyInventory:
    @pytest.mark.slow
    @given(jobs())
    @settings(max_examples=30)
    def test_each_cell_of_each_table_is_placed_once(self, job):
        plan = planned(*job)
        for table, placement in zip(plan.inventory.tables, plan.placements, strict=True) if plan else ():
            assert placement.table == table.name
            cut = list(shards(table, placement))
            assert [shard.rank for shard in cut] == list(placement.ranks)
            if placement.sharding_type == "data_parallel":
                assert placement.ranks == tuple(range(plan.topology.ranks))
                assert {(s.row, s.column, s.rows, s.columns) for s in cut} == {(0, 0, table.rows, table.dim)}
                continue
            step = -(-table.rows // 1000)  # a sample of the rows of a large table
            rows = np.arange(0, table.rows, step)
            count = np.zeros((len(rows), table.dim), dtype=int)
            for shard in cut:
                inside = (rows >= shard.row) & (rows < shard.row + shard.rows)
                count[inside, shard.column : shard.column + shard.columns] += 1
            assert (count == 1).all()
            assert sum(shard.rows * shard.columns for shard in cut) == table.rows * table.dim

    @pytest.mark.slow
    @given(jobs())
    @settings(max_examples=30)
    def test_constraints_are_kept(self, job):
        plan = planned(*job)
        for table, placement in zip(plan.inventory.tables, plan.placements, strict=True) if plan else ():
            assert placement_fault(table, placement, plan.topology) is None
            replicated = placement.sharding_type == "data_parallel"
            assert table.sharding_types is None or placement.sharding_type in table.sharding_types
            assert table.ranks is None or set(placement.ranks) <= set(table.ranks)
            count = 1 if replicated else len(placement.ranks)
            assert table.min_shards <= count <= (table.max_shards or count)
            assert placement.kernel in (("dense",) if replicated else table.kernels)
            assert table.kind == "pooled" or len(set(column_blocks(table.dim, placement.column_width))) == 1

    @pytest.mark.slow
    @given(jobs())
    @settings(max_examples=30)
    def test_memory_is_that_of_the_shards_and_fits(self, job):
        plan = planned(*job)
        if plan is None:
            return
        estimated = estimate(plan)
        assert estimated.fits
        hbm, host = np.zeros(plan.topology.ranks), np.zeros(plan.topology.ranks)
        for table, placement in zip(plan.inventory.tables, plan.placements, strict=True):
            for shard in shards(table, placement):
                weights, states = table_bytes(table, shard)
                of_rows = 4 * shard.rows if "rowwise" in table.optimizer else 0
                if "uvm" not in placement.kernel:
                    hbm[shard.rank] += weights + states
                    continue
                host[shard.rank] += weights + states - of_rows
                hbm[shard.rank] += of_rows
                if placement.kernel == "fused_uvm_caching":
                    hbm[shard.rank] += table.cache_load_factor * weights + 4 * shard.rows
        predicted = estimated.memory_MR[[MEMORY.index("tables"), MEMORY.index("table_optimizer")]].sum(axis=0)
        assert predicted == pytest.approx(hbm, rel=1e-12, abs=1e-6)
        assert estimated.host_R == pytest.approx(host, rel=1e-12, abs=1e-6)

    @pytest.mark.slow
    @given(jobs())
    @settings(max_examples=25)
    def test_equal_inventories_have_equal_plans(self, job):
        assert planned(*job) == planned(*job)


class TestDeterminism:
    @pytest.mark.slow
    def test_of_another_process(self):
        """Whatever the order of its sets: that of this process is another in each run of the tests."""
        text = dump_plan(search(*busy()))
        environment = os.environ | {"PYTHONHASHSEED": "4242", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", AGAIN]
        run = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=True)
        assert run.stdout == text


class TestRefusals:
    def test_a_rank_that_does_not_exist(self):
        inventory = InventoryConfig(rank_batch_size=8, tables=(described(ranks=(0, 4)),))
        with pytest.raises(PlanError, match=r"^table t: ranks names 4, but by hand has ranks 0 to 3$"):
            search(inventory, machine(4, 2))

    def test_tables_larger_than_the_memory(self):
        inventory = InventoryConfig(rank_batch_size=8, tables=(described(rows=10**9),))
        with pytest.raises(DoesNotFit, match="GB"):
            search(inventory, machine(2))
        search(inventory, machine(16))

    def test_too_little_for_the_rest_alone(self):
        inventory = InventoryConfig(rank_batch_size=8, tables=(described(),), dense=GivenDense(parameters=10**9))
        with pytest.raises(DoesNotFit) as error:
            search(inventory, machine(2))
        assert str(error.value) == (
            "without any table a rank needs 16.0 GB of 10.0 GB, most of it dense_optimizer (8.00 GB); "
            "dense.strategy=fsdp shares it"
        )


def test_tables_get_what_the_rest_leaves():
    inventory, topology = busy()
    capacity = table_capacity(inventory, topology)
    assert capacity.hbm_bytes == topology.hbm_bytes - sum(fixed_memory(inventory, topology).values())
    assert (capacity.ranks, capacity.ranks_per_host, capacity.host_bytes) == (16, 4, topology.host_bytes)


@pytest.mark.parametrize("name", list("abcdefgh"))
def test_the_bound_is_below_the_cost_wherever_the_most_read_row_is(name):
    table = TableConfig(name=name, rows=10, dim=16, ids_per_example=50.0, skew=1.0, sharding_types=("row_wise",))
    plan = search(InventoryConfig(rank_batch_size=512, tables=(table,)), machine(4, 4, "cuda"))
    assert estimate(plan).gap >= -1e-9


def test_a_model_without_tables():
    inventory = InventoryConfig(rank_batch_size=8, tables=(), dense=GivenDense(parameters=10**6))
    plan = search(inventory, machine(4))
    assert plan.placements == () and estimate(plan).fits
    assert parse_plan(dump_plan(plan)) == plan
    console = Console(file=StringIO(), width=80)
    for part in summary(estimate(plan)):
        console.print(part)
    assert "Sharding types" not in console.file.getvalue() and page(estimate(plan))
    other = InventoryConfig(rank_batch_size=8, tables=(TableConfig(name="a", rows=10, dim=4),))
    assert differences(plan, other, plan.topology)[0][1].endswith("(no tables, given dense part)")
