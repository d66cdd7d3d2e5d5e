"""The estimate of a plan, computed by hand on two ranks, and properties of any plan."""

from dataclasses import replace

import numpy as np
import pytest

from gr.config.inventory import GivenDense, InventoryConfig, LossInventory, TableConfig
from gr.planner.estimate import MEMORY, PHASES, estimate
from gr.planner.placement import Placement, Plan
from gr.planner.topology import Topology
from tests.support.plans import hand_made, machine

# 40 rows of 16 columns, 2 ids an example; 40 rows of 8 columns, 1 id an example. Batch 10 on 2 ranks: 40 and 20 ids a
# step, without skew. Memory at 1e10 bytes/s, links at 1e9, 1e11 FLOP/s.
LARGE = TableConfig(name="large", rows=40, dim=16, ids_per_example=2.0)
SMALL = TableConfig(name="small", rows=40, dim=8, optimizer="sgd")
DENSE = GivenDense(parameters=1000, forward_flops_per_example=1e4, activation_bytes_per_example=100.0)
JOB = InventoryConfig(
    rank_batch_size=10, tables=(LARGE, SMALL), dense=DENSE, loss=LossInventory(scores_per_example=5.0)
)
PLACEMENTS = (Placement("large", "table_wise", "fused", (0,)), Placement("small", "table_wise", "fused", (1,)))

LARGE_DISTINCT = 40 * (1 - (39 / 40) ** 40)
SMALL_DISTINCT = 40 * (1 - (39 / 40) ** 20)
LATENCY = 4 * (1e-5 + 0.2e-6)  # one group of tables, one peer
# Ids of 8 bytes and 20 lengths of 4, half of them to the other rank.
LARGE_INPUT = (40 * 8 + 20 * 4) / 2 / 1e9
SMALL_INPUT = (20 * 8 + 20 * 4) / 2 / 1e9
# 20 vectors in fp32, half of them to the other rank; their gradients come back.
LARGE_OUTPUT = 20 * 16 * 4 / 2 / 1e9
SMALL_OUTPUT = 20 * 8 * 4 / 2 / 1e9
# Ids, rows read first, rows read again from the cache at half the cost, vectors written.
LARGE_LOOKUP = (40 * 8 + LARGE_DISTINCT * 64 + (40 - LARGE_DISTINCT) * 64 / 2 + 20 * 64) / 1e10
SMALL_LOOKUP = (20 * 8 + SMALL_DISTINCT * 32 + (20 - SMALL_DISTINCT) * 32 / 2 + 20 * 32) / 1e10
# A sort of 96 bytes an id and a gradient of 4 a column; rows and their states (row-wise Adagrad: 4 bytes) in and out.
LARGE_UPDATE = (40 * (96 + 64) + 2 * LARGE_DISTINCT * (64 + 4)) / 1e10
SMALL_UPDATE = (20 * (96 + 32) + 2 * SMALL_DISTINCT * 32) / 1e10
# The dense part reaches dense_efficiency=0.5 of 1e11 FLOP/s.
FORWARD, BACKWARD = 10 * 1e4 / 5e10, 2 * 10 * 1e4 / 5e10
REDUCED = 2 * (1000 * 4 / 2) / 1e9  # gradients in fp32, a reduce-scatter and an all-gather


def planned(
    placements: tuple[Placement, ...] = PLACEMENTS, topology: Topology | None = None, bound: float = 0.0
) -> Plan:
    return Plan(JOB, topology or machine(2), placements, bound)


def phase(plan: Plan, name: str) -> list[float]:
    return estimate(plan).seconds_PR[PHASES.index(name)].tolist()


class TestByHand:
    @pytest.mark.parametrize(
        ("name", "seconds"),
        [
            ("input_all_to_all", [LARGE_INPUT + LATENCY / 2, SMALL_INPUT + LATENCY / 2]),
            ("lookup", [LARGE_LOOKUP, SMALL_LOOKUP]),
            ("output_all_to_all", [LARGE_OUTPUT + LATENCY / 4, SMALL_OUTPUT + LATENCY / 4]),
            ("dense_forward", [FORWARD] * 2),
            ("dense_backward", [BACKWARD] * 2),
            ("gradient_all_to_all", [LARGE_OUTPUT + LATENCY / 4, SMALL_OUTPUT + LATENCY / 4]),
            ("update", [LARGE_UPDATE, SMALL_UPDATE]),
            ("table_all_reduce", [0.0, 0.0]),
            ("gradient_all_reduce", [REDUCED] * 2),
        ],
    )
    def test_seconds(self, name, seconds):
        assert phase(planned(), name) == pytest.approx(seconds, rel=1e-9)

    @pytest.mark.parametrize(
        ("kind", "bytes_"),
        [
            ("tables", [40 * 16 * 4, 40 * 8 * 4]),
            ("table_optimizer", [40 * 4, 0]),
            ("table_gradients", [0, 0]),
            # The shard's ids twice, and its lengths; the 20 + 10 ids of the rank's own examples, twice.
            ("inputs", [2 * 40 * 8 + 20 * 4 + 2 * 30 * 8, 2 * 20 * 8 + 20 * 4 + 2 * 30 * 8]),
            # Vectors and their gradients; 10 examples with one vector of each table.
            ("embeddings", [2 * 20 * 64 + 2 * 10 * 24 * 4, 2 * 20 * 32 + 2 * 10 * 24 * 4]),
            ("dense_parameters", [4000, 4000]),
            ("dense_gradients", [4000, 4000]),
            ("dense_optimizer", [8000, 8000]),
            ("activations", [1000, 1000]),
            ("logits", [2 * 4 * 50, 2 * 4 * 50]),
            ("reserve", [0, 0]),
        ],
    )
    def test_memory(self, kind, bytes_):
        assert estimate(planned()).memory_MR[MEMORY.index(kind)].tolist() == pytest.approx(bytes_)

    def test_a_step_waits_for_the_slowest_rank_in_every_phase(self):
        estimated = estimate(planned())
        assert min(REDUCED, BACKWARD) == BACKWARD  # is what the backward pass hides of the all-reduce
        tables = LARGE_INPUT + LARGE_LOOKUP + 2 * LARGE_OUTPUT + LARGE_UPDATE + LATENCY
        assert estimated.step_seconds == pytest.approx(tables + FORWARD + BACKWARD + REDUCED - BACKWARD, rel=1e-9)

    def test_an_all_reduce_shorter_than_the_backward_pass_is_hidden(self):
        fast = replace(machine(2), intra_bandwidth=1e12)
        estimated = estimate(planned(topology=fast))
        reduced = estimated.seconds_PR[PHASES.index("gradient_all_reduce")][0]
        assert reduced == pytest.approx(REDUCED / 1000)
        assert estimated.hidden_P.tolist() == [0.0] * (len(PHASES) - 2) + [reduced, 0.0]

    def test_phases_wait_each_for_its_own_slowest_rank(self):
        """Rank 0 has the wider table, rank 1 the longer update."""
        slow_sgd = SMALL.model_copy(update={"ids_per_example": 20.0, "dim": 4})
        plan = Plan(JOB.model_copy(update={"tables": (LARGE, slow_sgd)}), machine(2), PLACEMENTS, 0.0)
        seconds = estimate(plan).seconds_PR
        output, update = seconds[PHASES.index("output_all_to_all")], seconds[PHASES.index("update")]
        assert output[0] > output[1] and update[0] < update[1]
        slowest = seconds.max(axis=1).sum()
        assert estimate(plan).step_seconds == pytest.approx(slowest - BACKWARD) and slowest > seconds.sum(axis=0).max()

    def test_the_straggler_has_the_costliest_tables(self):
        assert estimate(planned()).straggler == 0
        swapped = tuple(replace(p, ranks=(1 - p.ranks[0],)) for p in PLACEMENTS)
        assert estimate(planned(swapped)).straggler == 1

    def test_the_cost_is_that_of_the_straggler_and_the_gap_is_to_the_bound(self):
        cost = estimate(planned()).cost
        assert cost == pytest.approx(LARGE_INPUT + LARGE_LOOKUP + 2 * LARGE_OUTPUT + LARGE_UPDATE + LATENCY, rel=1e-9)
        assert estimate(planned(bound=cost / 1.25)).gap == pytest.approx(0.25)
        assert estimate(planned(bound=cost)).gap == pytest.approx(0.0)
        assert estimate(planned(bound=0.0)).gap == 0  # one rank, nothing to look up: no bound to compare with

    def test_bytes_on_the_links(self):
        dense = 2 * 1000 * 4 / 2
        estimated = estimate(planned())
        assert estimated.intra_bytes_R.tolist() == pytest.approx([200 + 2 * 640 + dense, 120 + 2 * 320 + dense])
        assert estimated.inter_bytes_R.tolist() == [0, 0]
        apart = estimate(planned(topology=machine(2, 1)))
        assert apart.inter_bytes_R.tolist() == pytest.approx(estimated.intra_bytes_R.tolist())
        assert apart.intra_bytes_R.tolist() == [0, 0]

    def test_fits_to_the_byte(self):
        most = int(estimate(planned()).total_memory_R.max())
        assert estimate(planned()).total_memory_R.argmax() == 0
        assert estimate(planned(topology=replace(machine(2), hbm_bytes=most))).fits
        assert not estimate(planned(topology=replace(machine(2), hbm_bytes=most - 1))).fits

    def test_offloaded_tables_take_host_memory(self):
        offloaded = (replace(PLACEMENTS[0], kernel="fused_uvm"), PLACEMENTS[1])
        held = 40 * 16 * 4  # the state of a row stays in HBM
        estimated = estimate(planned(offloaded))
        assert estimated.host_R.tolist() == [held, 0]
        assert estimated.memory_MR[MEMORY.index("tables")].tolist() == [0, 40 * 8 * 4]
        assert estimate(planned(offloaded, replace(machine(2), host_bytes=held))).fits
        assert not estimate(planned(offloaded, replace(machine(2), host_bytes=held - 1))).fits

    def test_shares_of_the_tables(self):
        large, small = estimate(planned()).tables
        assert (large.name, large.sharding_type, large.kernel, large.ranks) == ("large", "table_wise", "fused", (0,))
        assert (large.copies, large.shards, large.bytes, large.largest_shard_bytes) == (1, 1, 2720, 2720)
        assert large.seconds == pytest.approx(LARGE_INPUT + LARGE_LOOKUP + 2 * LARGE_OUTPUT + LARGE_UPDATE)
        assert small.bytes == 1280

    def test_a_replicated_table_has_the_bytes_of_one_copy(self):
        placements = (PLACEMENTS[0], Placement("small", "data_parallel", "dense", (0, 1)))
        small = estimate(planned(placements)).tables[1]
        assert (small.copies, small.shards, small.bytes, small.largest_shard_bytes) == (2, 1, 1280, 1280)

    def test_a_table_in_one_shard_is_table_wise_to_a_reader(self):
        for kind, width in (("column_wise", LARGE.dim), ("row_wise", None)):
            large = Placement("large", kind, "fused", (0,), width)
            assert large.shown_type == "table_wise" and large.sharding_type == kind
        assert Placement("small", "data_parallel", "dense", (0,)).shown_type == "data_parallel"

    def test_work_of_the_dense_part(self):
        estimated = estimate(planned())
        assert estimated.flops == 3 * 10 * 1e4 and estimated.tokens == 0

    def test_fp32_work_at_the_speed_of_fp32(self):
        plan = planned(topology=replace(machine(2), flops_fp32=1e10))
        assert phase(plan, "dense_forward") == pytest.approx([FORWARD] * 2)
        slow = replace(plan, inventory=JOB.model_copy(update={"precision": "fp32"}))
        assert phase(slow, "dense_forward") == pytest.approx([10 * FORWARD] * 2)


class TestAnyPlan:
    def test_one_rank_sends_nothing(self):
        on_one_rank = tuple(replace(placement, ranks=(0,)) for placement in PLACEMENTS)
        estimated = estimate(planned(on_one_rank, machine(1)))
        assert not estimated.intra_bytes_R.any() and not estimated.inter_bytes_R.any()
        sending = [PHASES.index(name) for name in PHASES if "all_" in name]
        assert not estimated.seconds_PR[sending].any()

    def test_shards_on_one_rank_add_up(self):
        """Two equal tables on one rank take twice the time of one, less the latency they share."""
        tables = [LARGE, LARGE.model_copy(update={"name": "twin"})]
        placements = [Placement(table.name, "table_wise", "fused", (0,)) for table in tables]
        one = estimate(hand_made(tables[:1], placements[:1], machine(2))).table_seconds_R[0] - LATENCY
        two = estimate(hand_made(tables, placements, machine(2))).table_seconds_R[0] - LATENCY
        assert two == pytest.approx(2 * one)

    def test_rows_beyond_the_last_take_nothing(self):
        """5 rows over 4 ranks: 2, 2, 1 and none."""
        table = TableConfig(name="t", rows=5, dim=4, optimizer="sgd")
        plan = hand_made([table], [Placement("t", "row_wise", "fused", (0, 1, 2, 3))], machine(4))
        assert estimate(plan).memory_MR[MEMORY.index("tables")] == pytest.approx(np.array([32, 32, 16, 0]))
