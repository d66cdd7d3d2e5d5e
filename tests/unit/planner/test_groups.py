"""Groups of ranks, what travels between them, and what lies in host memory: the planner's terms, and their refusals."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from gr.config.inventory import InventoryConfig, TableConfig
from gr.config.optim import RowWiseAdamW
from gr.embeddings.optimizers import fused_params
from gr.errors import ConfigError, PlanError
from gr.planner.constraints import constrained
from gr.planner.estimate import MEMORY, PHASES, estimate
from gr.planner.groups import one_group
from gr.planner.inventory import load_inventory
from gr.planner.plan import DoesNotFit, search
from gr.planner.planfile import check_plan, dump_plan, parse_plan
from gr.planner.remedies import explanation
from gr.planner.sharding_plan import to_sharding_plan
from gr.planner.topology import parse_topology
from tests.support.plans import machine
from tests.support.pooled import PooledTable
from tests.support.schemas import item_schema
from tests.support.sharded import Bags
from tests.support.tiny import tiny_config

TABLES = tuple(
    TableConfig(name=name, rows=rows, dim=16, optimizer="adagrad", ids_per_example=4.0, kernels=("fused",), **how)
    for name, rows, how in (
        ("big", 100_000, {"sharding_types": ("row_wise",)}),
        ("small", 40_000, {"sharding_types": ("table_wise",)}),
    )
)
JOB = InventoryConfig(global_batch_size=64, tables=TABLES)


def grouped(groups: int, interval: int = 1, **fields: object) -> InventoryConfig:
    return JOB.model_copy(update={"groups": groups, "sync_interval": interval, **fields})


def of(estimated, kind: str) -> np.ndarray:
    return estimated.memory_MR[MEMORY.index(kind)]


class TestGroups:
    def test_one_is_a_job_of_its_own(self):
        own, group = one_group(grouped(2), machine(8, 4))
        assert (own.batch_on(4), group.ranks, group.ranks_per_host, group.hosts) == (8, 4, 4, 1)
        own, group = one_group(grouped(4), machine(8, 4))
        assert (own.batch_on(2), group.ranks, group.ranks_per_host) == (8, 2, 2)

    @pytest.mark.parametrize(("groups", "ranks", "local"), [(3, 8, 4), (16, 8, 4), (4, 24, 8)])
    def test_they_are_equal_parts_of_hosts_or_whole_hosts(self, groups, ranks, local):
        with pytest.raises(PlanError, match=f"groups={groups} of {ranks} ranks, {local} a host"):
            one_group(grouped(groups), machine(ranks, local))

    def test_a_run_has_a_multiple_of_them(self):
        config = tiny_config("unused", "unused", planner={"groups": 2})
        config.check_ranks(4)
        with pytest.raises(ConfigError, match=r"planner\.groups=2 does not divide the 1 ranks of this run"):
            config.check_ranks(1)

    def test_fewer_are_a_remedy_and_so_are_states_on_the_host(self):
        tables = tuple(table.model_copy(update={"rows": 4 * 10**8}) for table in TABLES)
        job = grouped(2, tables=tables)
        topology = parse_topology("h100x2")
        with pytest.raises(DoesNotFit) as error:
            search(job, topology)
        remedies = explanation(job, topology, error.value)
        assert "fewer groups: groups=1: fits, " in remedies
        assert "optimizer states on the host (state: host, state_dtype: fp32): fits, " in remedies

    def test_each_has_the_tables_whole(self):
        one, two = (estimate(search(grouped(groups), machine(8, 4, "cuda"))) for groups in (1, 2))
        assert len(two.host_R) == 4 and 2 * of(one, "tables").sum() == 2 * of(two, "tables").sum()
        assert of(two, "tables").sum() == 140_000 * 16 * 4

    def test_what_they_average_crosses_the_network_every_interval(self):
        """Two copies of a rank's weights and accumulators, in fp32: an all-reduce sends each byte once."""
        bare, often, seldom = (
            estimate(search(grouped(groups, interval), machine(8, 4, "cuda")))
            for groups, interval in ((1, 1), (2, 1), (2, 10))
        )
        assert not bare.seconds_PR[PHASES.index("group_sync")].any()
        held = of(often, "tables") + of(often, "table_optimizer")
        assert often.seconds_PR[PHASES.index("group_sync")] == pytest.approx(held / 1e9)
        assert often.inter_bytes_R - seldom.inter_bytes_R == pytest.approx(0.9 * held)
        assert often.step_seconds > seldom.step_seconds

    def test_their_all_to_alls_stay_within_them(self):
        one, two = (estimate(search(grouped(groups, 10**6), machine(8, 4, "cuda"))) for groups in (1, 2))
        assert one.inter_bytes_R.max() > 1000 > two.inter_bytes_R.max()

    def test_a_plan_file_is_for_them(self):
        plan = search(grouped(2), machine(8, 4))
        read = parse_plan(dump_plan(plan))
        assert read == plan and {max(placement.ranks) < 4 for placement in read.placements} == {True}
        with pytest.raises(PlanError, match="in 2 groups"):
            check_plan(read, JOB, machine(8, 4))

    def test_a_rank_gets_the_shards_of_its_group(self):
        tables = tuple(PooledTable(table.name, table.rows, table.dim, (table.name,)) for table in TABLES)
        config = tiny_config("unused", "unused", embeddings={"optimizer": {"kind": "adagrad"}}).embeddings
        with torch.device("meta"):
            model = Bags(tables, config)
        plan = search(grouped(2), machine(8, 4))
        for rank, ranks in ((3, [0, 1, 2, 3]), (5, [4, 5, 6, 7])):
            own = to_sharding_plan(plan, model, torch.device("cpu"), rank).plan["tables"]
            assert own["big"].ranks == ranks and own["small"].ranks[0] in ranks
            assert [str(shard.placement) for shard in own["big"].sharding_spec.shards] == [
                f"rank:{rank}/cpu" for rank in ranks
            ]


class TestHostMemory:
    @pytest.mark.slow
    def test_the_paper_s_twelve_bytes_become_two(self):
        """arXiv 2402.17152, section 3.2, at 1.5T parameters: HBM has 2 + 4 / D bytes of each, the host 2."""
        began = os.times()
        estimated = estimate(search(load_inventory("configs/scale/hstu-1.5t.yaml"), parse_topology("h100x512")))
        ended = os.times()
        tables = estimated.plan.inventory.tables
        assert {table.dim for table in tables} == {1024}
        parameters = sum(table.rows * table.dim for table in tables)
        assert parameters == 1_464_843_750 * 1024
        assert of(estimated, "tables").sum() / parameters == pytest.approx(2, rel=1e-9)
        assert of(estimated, "table_optimizer").sum() / parameters == pytest.approx(4 / 1024, rel=1e-9)
        assert estimated.host_R.sum() / parameters == pytest.approx(2, rel=1e-9)
        assert estimated.fits and ended.user - began.user < 5
        plain = [table.model_copy(update={"dtype": "fp32", "state": "device", "optimizer": "adam"}) for table in tables]
        wide = [table.model_copy(update={"state_dtype": "fp32"}) for table in plain]
        inventory = estimated.plan.inventory.model_copy(update={"tables": tuple(wide)})
        dear = estimate(replace(estimated.plan, inventory=inventory))
        assert (of(dear, "tables") + of(dear, "table_optimizer")).sum() / parameters == pytest.approx(12, rel=1e-9)

    def test_states_cross_the_host_link(self):
        fields = {"rows": 10**6, "dim": 64, "dtype": "fp16", "optimizer": "rowwise_adamw", "ids_per_example": 8.0}
        homes = ({}, {"state": "host"}, {"state": "host", "state_dtype": "bf16"})
        tables = [TableConfig(name="t", sharding_types=("row_wise",), **fields, **home) for home in homes]
        jobs = [JOB.model_copy(update={"tables": (table,)}) for table in tables]
        near, far, half = (estimate(search(job, parse_topology("h100x2"))) for job in jobs)
        update = PHASES.index("update")
        assert near.seconds_PR[update].max() < half.seconds_PR[update].max() < far.seconds_PR[update].max()
        assert half.host_R.sum() == 10**6 * 64 * 2 and far.host_R.sum() == 10**6 * 64 * 4 and not near.host_R.any()

    @pytest.mark.parametrize(
        ("embeddings", "message"),
        [
            ({"compute_kernel": "fused_uvm"}, "compute_kernel=fused_uvm is of CUDA"),
            (
                {"tables": {"item_id": {"compute_kernel": "fused_uvm_caching"}}},
                "compute_kernel=fused_uvm_caching is of",
            ),
            ({"optimizer": {"kind": "adam", "state": "host"}}, "optimizer.state=host, state_dtype=fp32 are of CUDA"),
            ({"optimizer": {"kind": "rowwise_adamw", "state_dtype": "bf16"}}, "state_dtype=bf16 are of CUDA"),
        ],
    )
    def test_a_cpu_refuses_it_by_name(self, embeddings, message):
        config = tiny_config("unused", "unused", embeddings=embeddings)
        inventory = config.inventory(item_schema(30))
        with pytest.raises(ConfigError, match=message):
            constrained(inventory, config.planner, "cpu")
        assert constrained(inventory, config.planner, "cuda").tables[0].kernels == inventory.tables[0].kernels

    def test_the_planner_may_choose(self):
        config = tiny_config("unused", "unused", embeddings={"compute_kernel": "auto", "cache_load_factor": 0.5})
        (table,) = config.inventory(item_schema(10**6)).tables
        assert (table.kernels, table.cache_load_factor) == (("fused", "fused_uvm", "fused_uvm_caching"), 0.5)
        (table,) = constrained(config.inventory(item_schema(30)), config.planner, "cpu").tables
        assert table.kernels == ("dense",)

    @pytest.mark.parametrize(
        ("optimizer", "message"),
        [
            ({"kind": "sgd", "state": "host"}, "and sgd has none"),
            ({"kind": "adam", "state_dtype": "bf16"}, "for rowwise_adamw and partial_rowwise_adam only"),
        ],
    )
    def test_states_that_fbgemm_does_not_keep_so(self, optimizer, message):
        with pytest.raises(ValueError, match=message):
            tiny_config("unused", "unused", embeddings={"optimizer": optimizer})

    def test_fbgemm_is_told(self):
        told, again = (fused_params(RowWiseAdamW(state="host", state_dtype="bf16")) for _ in range(2))
        assert told["uvm_non_rowwise_momentum"] is True
        assert {name: dtype.value for name, dtype in told["optimizer_state_dtypes"].items()} == {"momentum1": "bf16"}
        # TorchRec hashes the parameters to group tables by them.
        assert hash(tuple(told.items())) == hash(tuple(again.items()))
        assert "uvm_non_rowwise_momentum" not in fused_params(RowWiseAdamW())
