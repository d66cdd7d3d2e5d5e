"""The remedies for a model that does not fit: each that is named was tried, and a no is not taken from a neighbour."""

from dataclasses import replace

import pytest

from gr.config.inventory import GivenDense, InventoryConfig, TableConfig
from gr.planner.estimate import estimate
from gr.planner.plan import DoesNotFit, search
from gr.planner.remedies import explanation, nearest
from gr.planner.topology import Topology, parse_topology
from tests.support.plans import machine


def remedies(inventory: InventoryConfig, topology: Topology, divides: int = 0) -> list[str]:
    with pytest.raises(DoesNotFit) as error:
        search(inventory, topology)
    lines = explanation(inventory, topology, error.value, divides).splitlines()
    return [line.strip() for line in lines[lines.index("remedies tried:") + 1 :]]


def table(name: str = "a", rows: int = 10**9, **fields) -> TableConfig:
    return TableConfig.model_validate({"name": name, "rows": rows, "dim": 16, "optimizer": "sgd", **fields})


class TestOtherNumbersOfRanks:
    GROWING = InventoryConfig(rank_batch_size=16384, tables=(table(rows=3 * 10**9, dim=128, ids_per_example=100.0),))

    def test_fewer_where_more_ranks_read_too_many_ids(self):
        first = remedies(self.GROWING, parse_topology("h100x32768"))[0]
        assert first == "fewer ranks: 24 ranks fit (3 hosts of 8)"

    def test_more(self):
        assert remedies(self.GROWING, parse_topology("h100x8"))[0] == "more hosts: 24 ranks fit (3 hosts of 8)"

    def test_only_those_that_divide_the_batch(self):
        assert remedies(self.GROWING, parse_topology("h100x8"), 1 << 20)[0] == "more hosts: 32 ranks fit (4 hosts of 8)"

    def test_none(self):
        whole = InventoryConfig(rank_batch_size=8, tables=(table(dim=128, sharding_types=("table_wise",)),))
        first = remedies(whole, parse_topology("h100x8"))[0]
        assert first.startswith(
            "more hosts: nothing up to 65,536 ranks fits: each of the 8,199 numbers of ranks has less"
        )


class TestOffload:
    """One rank of 20 GB."""

    def offload(self, *tables: TableConfig, host_bytes: int = 10**12) -> str:
        topology = replace(machine(1, 1, "cuda"), hbm_bytes=20 * 10**9, host_bytes=host_bytes)
        lines = remedies(InventoryConfig(rank_batch_size=1, tables=tables), topology)
        (outcome,) = (line for line in lines if line.startswith("offload"))
        return outcome

    def test_the_fewest_tables(self):
        """9.6 GB each, and 2.2 GB where it is offloaded."""
        fields = {"dtype": "fp16", "cache_load_factor": 0.1, "rows": 3 * 10**8}
        outcome = self.offload(*(table(name, **fields) for name in "abc"))
        assert outcome.startswith("offload a, b (kernels: [fused_uvm_caching]): fits, 13.9 GB on the fullest rank")

    def test_a_table_that_is_too_large_for_the_host_stays(self):
        outcome = self.offload(table("kept", 2 * 10**8), table("moved", 10**8, dim=20), host_bytes=9 * 10**9)
        assert outcome.startswith("offload moved (kernels: [fused_uvm_caching]): fits")

    def test_a_table_that_gains_nothing_stays(self):
        cached = {"cache_load_factor": 1.0}
        assert self.offload(table("a", 3 * 10**8, **cached), table("b", 2 * 10**8)).startswith(
            "offload: with up to 1 tables"
        )

    def test_a_table_that_is_replicated_stays(self):
        replicated = table("a", 10**8, sharding_types=("data_parallel",))
        assert self.offload(replicated, table("b", 3 * 10**8)).startswith(
            "offload b (kernels: [fused_uvm_caching]): fits"
        )

    def test_a_table_that_can_only_be_replicated_on_these_ranks_stays(self):
        """Row-wise it would have a shard on each of three ranks."""
        topology = replace(machine(3, 3, "cuda"), hbm_bytes=20 * 10**9, host_bytes=10**12)
        kept = table("kept", 10**6, sharding_types=("data_parallel", "row_wise"), max_shards=1)
        tables = (kept, table("moved", 10**9, sharding_types=("table_wise",)))
        lines = remedies(InventoryConfig(rank_batch_size=1, tables=tables), topology)
        assert any(line.startswith("offload moved (kernels: [fused_uvm_caching]): fits") for line in lines)


def test_a_dense_part_that_is_too_large_alone():
    inventory = InventoryConfig(rank_batch_size=1, tables=(), dense=GivenDense(parameters=10**10))
    lines = remedies(inventory, machine(4, 4, "cuda"))
    assert lines[0].startswith("more hosts: nothing up to 65,536 ranks fits: ")
    assert "offload: it moves tables alone, for which a rank has no memory at all" in lines


def test_the_nearest_plan_is_for_the_machine_and_above_its_memory():
    inventory, topology = InventoryConfig(rank_batch_size=8, tables=(table(), table("b"))), machine(4, 4, "cuda")
    estimated = estimate(nearest(inventory, topology))
    assert estimated.plan.topology == topology and not estimated.fits
    assert estimated.total_memory_R.max() == pytest.approx(2 * 64e9 / 4, rel=0.02)
