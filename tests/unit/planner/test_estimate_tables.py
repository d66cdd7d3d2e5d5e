"""The cost of a shard: bytes by dtype and optimizer, traffic, links, kernels, latencies."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.config.inventory import InventoryConfig, TableConfig
from gr.planner.estimate import PHASES, estimate, placement_costs
from gr.planner.estimate_tables import CollectiveCosts, ShardCosts, table_bytes, traffic
from gr.planner.placement import Placement, Plan, Shard
from tests.support.plans import hand_made, machine

TWO_HOSTS = machine(4, 2)


def described(**fields: object) -> TableConfig:
    return TableConfig.model_validate({"name": "t", "rows": 1000, "dim": 16, "ids_per_example": 5.0, **fields})


def costs_of(
    table: TableConfig,
    sharding_type: str,
    ranks: int = 4,
    *,
    width: int | None = None,
    kernel: str = "fused",
    **job: object,
) -> ShardCosts:
    """The traffic or costs of `table` on the first `ranks` of four, two a host; batch 8."""
    job = {"rank_batch_size": 8, "tables": (table,), **job}
    inventory, placement = InventoryConfig.model_validate(job), Placement("t", sharding_type, kernel, (0,), width)
    placement = replace(placement, ranks=tuple(range(ranks)))
    return placement_costs(traffic(inventory, TWO_HOSTS)[0], table, placement, inventory, TWO_HOSTS)


class TestTableBytes:
    @pytest.mark.parametrize(
        ("optimizer", "states"),
        [
            ("sgd", 0),
            ("rowwise_adagrad", 10 * 4),
            ("adagrad", 10 * 8 * 4),
            ("adam", 2 * 10 * 8 * 4),
            ("partial_rowwise_adam", 10 * (8 + 1) * 4),
        ],
    )
    def test_states_are_fp32_whatever_the_weights(self, optimizer, states):
        shard = Shard(rank=0, row=0, column=0, rows=10, columns=8)
        assert table_bytes(described(optimizer=optimizer, dtype="fp32"), shard) == (320, states)
        assert table_bytes(described(optimizer=optimizer, dtype="fp16"), shard) == (160, states)


class TestTraffic:
    def test_a_step_reads_the_examples_of_all_ranks_and_their_shared_ids(self):
        inventory = InventoryConfig(rank_batch_size=8, tables=(described(ids_per_step=3.0, features=2),))
        lookups = traffic(inventory, TWO_HOSTS)
        assert lookups.own_ids == [5 * 8 + 3] and lookups.ids == [4 * 43]
        assert lookups.own_outputs == [2 * 8] and lookups.outputs == [64] and lookups.lengths == [64]

    def test_a_global_batch_is_divided_over_the_ranks(self):
        inventory = InventoryConfig(global_batch_size=30, tables=(described(),))
        assert traffic(inventory, TWO_HOSTS).own_ids == [5 * 8]

    def test_dedup_sends_each_row_of_a_sequence_once_and_leaves_pooled_tables(self):
        tables = (described(name="s", kind="sequence", rows=10), described(name="p", rows=10))
        lookups = traffic(InventoryConfig(rank_batch_size=8, tables=tables, index_dedup=True), TWO_HOSTS)
        assert lookups.own_ids[0] == lookups.own_distinct[0] == pytest.approx(10 * (1 - 0.9**40))
        assert lookups.own_outputs[0] == lookups.own_ids[0]
        assert lookups.own_ids[1] == 40 and lookups.own_outputs[1] == 8

    @given(
        rows=st.integers(1, 10**9),
        ids=st.floats(0.01, 1e4),
        skews=st.tuples(st.floats(0, 4), st.floats(0, 4)).map(sorted),
    )
    @settings(max_examples=200)
    def test_more_skew_never_means_more_distinct_rows(self, rows, ids, skews):
        tables = tuple(
            described(name=str(i), rows=rows, ids_per_example=ids, skew=skew) for i, skew in enumerate(skews)
        )
        lookups = traffic(InventoryConfig(rank_batch_size=8, tables=tables), TWO_HOSTS)
        for distinct in (lookups.distinct, lookups.own_distinct):
            assert distinct[1] <= distinct[0] * (1 + 1e-3)  # what distinct_ids is exact to
        assert lookups.hottest[1] >= lookups.hottest[0] * (1 - 1e-9)


class TestLinks:
    def test_an_all_to_all_keeps_the_part_of_its_own_rank(self):
        seconds, intra, inter = CollectiveCosts(replace(TWO_HOSTS, inter_bandwidth=5e8)).all_to_all(np.array([4000.0]))
        assert intra == [1000] and inter == [2000] and seconds == pytest.approx(2000 / 5e8)

    def test_a_ring_crosses_hosts_on_every_card_of_a_host(self):
        seconds, intra, inter = CollectiveCosts(TWO_HOSTS).reduce_scatter(np.array([4000.0]))
        assert inter == [1500] and intra == [1500] and seconds == pytest.approx(3000 / 1e9)
        twice = CollectiveCosts(TWO_HOSTS).all_reduce(np.array([4000.0]))
        assert [float(figure[0]) for figure in twice] == pytest.approx([6e-6, 3000, 3000])

    def test_within_hosts_first_then_between_them(self):
        seconds, intra, inter = CollectiveCosts(TWO_HOSTS).host_reduce_scatter(np.array([4000.0]))
        assert intra == [2000] and inter == [1000] and seconds == pytest.approx(3000 / 1e9)

    def test_one_rank_sends_nothing_and_waits_for_nobody(self):
        links = CollectiveCosts(machine(1))
        for collective in (links.all_to_all, links.reduce_scatter, links.host_reduce_scatter, links.all_reduce):
            assert [float(figure[0]) for figure in collective(np.array([4000.0]))] == [0, 0, 0]
        assert links.group_seconds() == 0

    def test_one_host_waits_for_its_own_link_only(self):
        assert CollectiveCosts(machine(4, 4)).group_seconds() == pytest.approx(4 * (1e-5 + 3 * 0.2e-6))
        slow = replace(TWO_HOSTS, inter_latency=1e-3)
        assert CollectiveCosts(slow).group_seconds() == pytest.approx(4 * (1e-3 + 3 * 0.2e-6))


class TestShards:
    @given(
        rows=st.integers(1, 200),
        skew=st.floats(0, 4),
        kind=st.sampled_from(["pooled", "sequence"]),
        dedup=st.booleans(),
        sharding_type=st.sampled_from(["row_wise", "table_row_wise"]),
    )
    @settings(max_examples=100)
    def test_row_shards_divide_the_ids_and_the_rows(self, rows, skew, kind, dedup, sharding_type):
        kind = "pooled" if sharding_type == "table_row_wise" else kind
        table = described(rows=rows, skew=skew, kind=kind)
        ranks = 4 if sharding_type == "row_wise" else 2
        whole = costs_of(table, "table_wise", 1, index_dedup=dedup)
        cut = costs_of(table, sharding_type, ranks, index_dedup=dedup)
        lengths = 8 * 4 * 4  # one length an example, in every shard
        assert (cut.inputs - lengths).sum() == pytest.approx(whole.inputs[0] - lengths, rel=1e-12)
        assert cut.tables.sum() == pytest.approx(rows * 16 * 4, rel=1e-12)
        assert cut.table_optimizer.sum() == pytest.approx(rows * 4, rel=1e-12)

    def test_rows_that_no_id_asks_for_more_are_alike(self):
        ids = costs_of(described(rows=1000, skew=0.0), "row_wise").inputs
        assert ids.max() / ids.min() < 1.01
        hot = costs_of(described(rows=1000, skew=2.0), "row_wise").inputs
        assert np.sum(hot > 2 * hot.min()) == 1

    def test_row_shards_of_a_pooled_table_send_partial_sums_of_every_example(self):
        whole = costs_of(described(), "table_wise", 1)
        cut = costs_of(described(), "row_wise")
        assert cut.embeddings == pytest.approx([whole.embeddings[0]] * 4)
        rows = costs_of(described(kind="sequence"), "row_wise")
        assert rows.embeddings.sum() == pytest.approx(
            costs_of(described(kind="sequence"), "table_wise", 1).embeddings[0]
        )

    def test_column_blocks_are_asked_for_all_ids_each(self):
        cut, whole = (
            costs_of(described(dim=20), "column_wise", 3, width=8),
            costs_of(described(dim=20), "table_wise", 1),
        )
        assert cut.inputs == pytest.approx([whole.inputs[0]] * 3)
        assert cut.tables.tolist() == [1000 * 8 * 4, 1000 * 8 * 4, 1000 * 4 * 4]
        assert cut.table_optimizer.tolist() == [4000] * 3  # row statistics in every block

    def test_a_replica_serves_the_examples_of_its_rank(self):
        small, large = (
            placement_costs(traffic(inventory, topology)[0], inventory.tables[0], placement, inventory, topology)
            for topology, inventory in (
                (machine(ranks), InventoryConfig(rank_batch_size=8, tables=(described(),))) for ranks in (2, 16)
            )
            for placement in [Placement("t", "data_parallel", "dense", tuple(range(topology.ranks)))]
        )
        for name in ("lookup", "inputs", "embeddings", "tables", "table_optimizer", "table_gradients"):
            assert set(getattr(large, name)) == set(getattr(small, name)), name
        assert large.update[0] > small.update[0], "every replica updates the rows that any rank looked up"
        assert large.table_all_reduce[0] == pytest.approx(small.table_all_reduce[0] * (15 / 16) / (1 / 2))
        assert not large.input_all_to_all.any() and not large.output_all_to_all.any()

    def test_half_precision_on_the_wire_halves_what_is_sent(self):
        wide, narrow, mixed = (
            costs_of(described(), "table_wise", 1, comm_dtype={"forward": forward, "backward": backward})
            for forward, backward in (("fp32", "fp32"), ("bf16", "bf16"), ("int8", "fp32"))
        )
        assert narrow.output_all_to_all * 2 == pytest.approx(wide.output_all_to_all)
        assert narrow.gradient_all_to_all * 2 == pytest.approx(wide.gradient_all_to_all)
        assert mixed.output_all_to_all == pytest.approx(wide.output_all_to_all * (32 + 8) / (4 * 32))
        assert mixed.gradient_all_to_all == pytest.approx(wide.gradient_all_to_all)
        assert narrow.input_all_to_all == pytest.approx(wide.input_all_to_all)
        assert narrow.embeddings == pytest.approx(wide.embeddings)

    def test_seconds_and_bytes_are_the_sums_of_their_kinds(self):
        one = costs_of(described(), "row_wise")
        assert one.seconds == pytest.approx(
            one.input_all_to_all + one.lookup + 2 * one.output_all_to_all + one.update + one.table_all_reduce
        )
        assert one.hbm == pytest.approx(
            one.tables + one.table_optimizer + one.table_gradients + one.inputs + one.embeddings
        )


class TestKernels:
    def test_fused_rows_are_in_hbm(self):
        costs = costs_of(described(), "table_wise", 1)
        assert costs.tables == [64_000] and costs.table_optimizer == [4000]
        assert costs.host == [0] and costs.table_gradients == [0]

    def test_uvm_rows_are_on_the_host(self):
        costs = costs_of(described(), "table_wise", 1, kernel="fused_uvm")
        assert costs.host == [64_000] and costs.tables == [0] and costs.table_optimizer == [4000]

    def test_a_cache_is_in_hbm_and_the_whole_table_on_the_host(self):
        table = described(cache_load_factor=0.25)
        costs = costs_of(table, "table_wise", 1, kernel="fused_uvm_caching")
        slots = 4 * 1000  # a number for every row
        assert costs.host == [64_000] and costs.tables == [16_000 + slots] and costs.table_optimizer == [4000]

    @pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
    def test_states_of_elements_go_with_the_weights_and_states_of_rows_stay(self, kernel):
        """The split is that of fbgemm's tables (construct_split_state)."""
        costs = costs_of(described(optimizer="adam"), "table_wise", 1, kernel=kernel)
        assert costs.host == [64_000 * 3] and costs.table_optimizer == [0]
        costs = costs_of(described(optimizer="partial_rowwise_adam"), "table_wise", 1, kernel=kernel)
        assert costs.host == [64_000 * 2] and costs.table_optimizer == [4000]

    def test_dense_gradients_are_those_of_the_ids_in_fp32(self):
        """5 ids of 8 examples on 4 ranks, 16 columns."""
        costs = costs_of(described(dtype="fp16"), "table_wise", 1, kernel="dense")
        assert costs.table_gradients == [5 * 8 * 4 * 16 * 4] and costs.tables == [32_000] and costs.host == [0]

    def test_the_nearer_the_rows_the_less_they_cost(self):
        inventory = InventoryConfig(rank_batch_size=8, tables=(described(skew=1.0),))
        topology = replace(TWO_HOSTS, host_bandwidth=1e9)
        lookups = traffic(inventory, topology)[0]
        seconds = [
            float(
                placement_costs(
                    lookups, inventory.tables[0], Placement("t", "table_wise", kernel, (0,)), inventory, topology
                ).seconds[0]
            )
            for kernel in ("fused", "fused_uvm_caching", "fused_uvm")
        ]
        assert seconds[0] < seconds[1] < seconds[2]


class TestLatency:
    GROUP = 4 * (1e-5 + 0.2e-6)

    @pytest.mark.parametrize(
        ("types", "groups"),
        [
            (("table_wise",), 1),
            (("table_wise", "table_wise", "table_wise"), 1),
            (("table_wise", "row_wise", "table_wise"), 2),
            (("data_parallel", "data_parallel"), 0),
            (("row_wise", "data_parallel"), 1),
        ],
    )
    def test_is_paid_once_for_each_sharding_type(self, types, groups):
        plan = self.plan(types)
        estimated = estimate(plan)
        lookups = traffic(plan.inventory, plan.topology)
        seconds = np.zeros(2)
        for index, (table, placement) in enumerate(zip(plan.inventory.tables, plan.placements, strict=True)):
            costs = placement_costs(lookups[index], table, placement, plan.inventory, plan.topology)
            seconds[list(placement.ranks)] += costs.seconds
        assert estimated.table_seconds_R - seconds == pytest.approx([groups * self.GROUP] * 2)

    def test_is_in_the_three_phases_with_collectives(self):
        estimated, plan = estimate(self.plan(("table_wise",))), self.plan(("table_wise",))
        costs = placement_costs(
            traffic(plan.inventory, plan.topology)[0],
            plan.inventory.tables[0],
            plan.placements[0],
            plan.inventory,
            plan.topology,
        )
        for phase, share in (("input_all_to_all", 0.5), ("output_all_to_all", 0.25), ("gradient_all_to_all", 0.25)):
            added = estimated.seconds_PR[PHASES.index(phase)][0] - getattr(costs, phase)[0]
            assert added == pytest.approx(share * self.GROUP)

    @staticmethod
    def plan(types: tuple[str, ...]) -> Plan:
        every = {"row_wise", "data_parallel"}
        tables = [described(name=str(i)) for i in range(len(types))]
        placements = [
            Placement(str(i), kind, "dense" if kind == "data_parallel" else "fused", (0, 1) if kind in every else (0,))
            for i, kind in enumerate(types)
        ]
        return hand_made(tables, placements, machine(2))
