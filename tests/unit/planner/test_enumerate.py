"""Options against the shards they stand for: sums, maxima, constraints."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.config.inventory import SHARDING_TYPES, CommDtype, InventoryConfig, TableConfig, sharding_types_of
from gr.errors import PlanError
from gr.planner.candidates import Options, Scope
from gr.planner.enumerate import KERNELS, SCOPES, hottest_part, row_parts, search_space
from gr.planner.estimate import placement_costs
from gr.planner.estimate_tables import ShardCosts, traffic
from gr.planner.placement import Placement
from gr.planner.topology import Topology
from tests.support.plans import machine

FOUR = machine(4, 2, "cuda")
TOPOLOGIES = st.sampled_from(
    [machine(n, local, "cuda") for n, local in [(1, 1), (2, 2), (3, 3), (4, 4), (4, 2), (6, 2)]]
)


def described(**fields: object) -> TableConfig:
    return TableConfig.model_validate({"name": "t", "rows": 1000, "dim": 16, "ids_per_example": 5.0, **fields})


def space(*tables: TableConfig, topology: Topology = FOUR) -> Options:
    return search_space(InventoryConfig(rank_batch_size=8, tables=tables), topology)


def types(options: Options) -> list[str]:
    return [SHARDING_TYPES[index] for index in options.sharding_type_O]


@st.composite
def jobs(draw: st.DrawFn) -> InventoryConfig:
    kind, pooling = draw(st.sampled_from(["pooled", "sequence"])), draw(st.sampled_from(["sum", "mean"]))
    table = described(
        rows=draw(st.sampled_from([1, 2, 3, 5, 7, 10, 1000, 10**6])),  # some fewer than ranks
        dim=draw(st.sampled_from([4, 8, 12, 20, 32, 64])),  # some not a multiple of the width
        dtype=draw(st.sampled_from(["fp32", "fp16"])),
        kind=kind,
        pooling=pooling,
        features=draw(st.integers(1, 3)),
        ids_per_example=draw(st.sampled_from([0.01, 0.3, 1.0, 50.0])),
        skew=draw(st.sampled_from([0.0, 0.5, 1.0, 1.05, 2.0, 4.0])),
        optimizer=draw(st.sampled_from(["adam", "rowwise_adagrad", "sgd"])),
        sharding_types=sharding_types_of(kind, pooling),
        kernels=KERNELS,
    )
    return InventoryConfig(
        rank_batch_size=draw(st.integers(1, 64)),
        comm_dtype=CommDtype(**{way: draw(st.sampled_from(["fp32", "bf16"])) for way in ("forward", "backward")}),
        index_dedup=draw(st.booleans()),
        tables=(table,),
    )


def shards_of(options: Options, option: int, job: InventoryConfig, topology: Topology) -> ShardCosts:
    """The costs of every shard of an option of the only table."""
    placement = Placement(
        "t",
        SHARDING_TYPES[options.sharding_type_O[option]],
        KERNELS[options.kernel_O[option]],
        tuple(range(int(options.shards_O[option]))),
        int(options.column_width_O[option]) or None,
    )
    return placement_costs(traffic(job, topology)[0], job.tables[0], placement, job, topology)


def odd_ones(options: Options, option: int, topology: Topology) -> slice:
    odd = int(options.extra_shard_O[option])
    return slice(odd, None if options.scope_O[option] == Scope.HOST else odd + 1, topology.ranks_per_host)


class TestTotals:
    @pytest.mark.slow
    @given(jobs(), TOPOLOGIES)
    @settings(max_examples=60)
    def test_bytes_are_the_sum_of_the_shards(self, job, topology):
        options = search_space(job, topology)
        for option in range(len(options.table_O)):
            costs = shards_of(options, option, job, topology)
            assert options.total_hbm_O[option] == pytest.approx(costs.hbm.sum(), rel=1e-9)

    @pytest.mark.slow
    @given(jobs(), TOPOLOGIES)
    @settings(max_examples=60)
    def test_seconds_are_never_above_the_sum_of_the_shards(self, job, topology):
        """A bound is made of them."""
        options = search_space(job, topology)
        for option in range(len(options.table_O)):
            seconds = shards_of(options, option, job, topology).seconds.sum()
            assert 0.98 * seconds <= options.total_seconds_O[option] <= seconds * (1 + 1e-9)

    @pytest.mark.slow
    @given(jobs(), TOPOLOGIES)
    @settings(max_examples=60)
    def test_seconds_are_the_sum_of_the_shards_where_rows_repeat(self, job, topology):
        """Every shard has ids enough to read some of its rows again."""
        busy = job.tables[0].model_copy(update={"ids_per_example": 2.0 * job.tables[0].rows, "skew": 0.0})
        job = job.model_copy(update={"tables": (busy,), "index_dedup": False})
        options = search_space(job, topology)
        for option in range(len(options.table_O)):
            seconds = shards_of(options, option, job, topology).seconds.sum()
            assert options.total_seconds_O[option] == pytest.approx(seconds, rel=1e-9)

    @pytest.mark.slow
    @given(jobs(), TOPOLOGIES)
    @settings(max_examples=60)
    def test_no_shard_takes_more_than_its_option_says(self, job, topology):
        options = search_space(job, topology)
        for option in range(len(options.table_O)):
            costs = shards_of(options, option, job, topology)
            odd = odd_ones(options, option, topology)
            for actual, even, extra in (
                (costs.seconds, options.seconds_O[option], options.extra_seconds_O[option]),
                (costs.hbm, options.hbm_O[option], options.extra_hbm_O[option]),
                (costs.host, options.host_O[option], 0.0),
            ):
                message = np.full(len(actual), even)
                message[odd] += extra
                assert (actual <= message * (1 + 1e-9)).all()

    def test_column_blocks_of_one_width_cost_what_their_option_says(self):
        options = space(described(dim=64, sharding_types=("column_wise",)))
        even = 64 % options.column_width_O == 0
        assert even.sum() == 2  # 8 columns, and all 64
        assert options.extra_seconds_O[even] == pytest.approx(np.zeros(even.sum()), abs=1e-18)
        assert (options.shards_O * options.seconds_O)[even] == pytest.approx(options.total_seconds_O[even], rel=1e-9)

    def test_the_narrower_last_block_costs_less(self):
        job = InventoryConfig(rank_batch_size=8, tables=(described(dim=20, sharding_types=("column_wise",)),))
        options = search_space(job, FOUR)
        (option,) = np.flatnonzero(options.column_width_O == 8)
        costs = shards_of(options, int(option), job, FOUR)
        assert options.extra_shard_O[option] == 2 and options.extra_seconds_O[option] < 0
        assert costs.seconds[2] == pytest.approx(options.seconds_O[option] + options.extra_seconds_O[option])
        assert costs.hbm[2] == pytest.approx(options.hbm_O[option] + options.extra_hbm_O[option])


class TestHottestPart:
    @given(rows=st.integers(1, 100), parts=st.integers(1, 20), name=st.text(min_size=1, max_size=5))
    def test_has_rows(self, rows, parts, name):
        part = hottest_part(described(name=name, rows=rows), parts)
        assert 0 <= part * -(-rows // parts) < rows

    def test_differs_between_tables(self):
        assert len({hottest_part(described(name=str(i), rows=8), 8) for i in range(50)}) == 8


class TestConstraints:
    def test_unset_every_type_that_is_right_is_tried(self):
        assert set(types(space(described()))) == set(SHARDING_TYPES) - {"table_column_wise"}
        assert set(types(space(described(kind="sequence")))) == set(sharding_types_of("sequence", "sum"))
        assert "grid_shard" not in types(space(described(pooling="mean")))

    @pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
    def test_one_type_only(self, sharding_type):
        options = space(described(dim=64, sharding_types=(sharding_type,)))
        assert set(types(options)) == {sharding_type}
        assert set(options.scope_O) == {SCOPES[sharding_type]}

    def test_kernels(self):
        options = space(described(kernels=("fused", "fused_uvm"), sharding_types=("table_wise", "row_wise")))
        assert sorted(KERNELS[kernel] for kernel in options.kernel_O) == ["fused", "fused", "fused_uvm", "fused_uvm"]

    def test_shards(self):
        options = space(described(dim=64, min_shards=2, max_shards=3))
        assert set(options.shards_O) == {2, 3}
        # Replicas are one shard, however many there are.
        assert "data_parallel" in types(space(described(max_shards=1)))
        assert "data_parallel" not in types(space(described(min_shards=2)))

    def test_ranks(self):
        options = space(described(ranks=(2, 3)), described(name="free"))
        assert options.allowed_TR is not None
        assert options.allowed_TR.tolist() == [[False, False, True, True], [True] * 4]
        pinned = {SHARDING_TYPES[i] for i in options.sharding_type_O[options.table_O == 0]}
        assert pinned == {"table_wise", "column_wise", "table_row_wise"}
        assert "table_row_wise" not in types(space(described(ranks=(1, 2))))  # no whole host

    @pytest.mark.parametrize(("rows", "empty"), [(3, True), (4, False), (5, True), (6, True), (7, False)])
    def test_no_shard_is_empty_on_cpu(self, rows, empty):
        """5 rows over 4 ranks: 2, 2, 1 and none."""
        on_cpu, on_gpu = (types(space(described(rows=rows), topology=machine(4, 4, kind))) for kind in ("cpu", "cuda"))
        assert ("row_wise" not in on_cpu) == empty and "row_wise" in on_gpu

    def test_no_rank_is_named(self):
        assert space(described()).allowed_TR is None

    def test_column_widths_are_what_fbgemm_takes(self):
        free = space(described(dim=100, sharding_types=("column_wise", "table_wise")))
        cut = free.column_width_O[free.column_width_O > 0]
        assert len(cut) and not (cut % 4).any() and (cut >= 8).all()
        forced = space(described(dim=8, sharding_types=("column_wise",)))
        assert forced.column_width_O.tolist() == [4]

    def test_one_width_of_sequence_blocks(self):
        options = space(described(kind="sequence", dim=64))
        assert set(options.column_width_O[options.column_width_O > 0]) == {32}

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"min_shards": 9}, "min_shards=9"),
            ({"max_shards": 1, "sharding_types": ("row_wise",)}, "sharding_types=('row_wise',), max_shards=1"),
            ({"ranks": (1,), "sharding_types": ("row_wise",)}, "sharding_types=('row_wise',), ranks=(1,)"),
            ({"dim": 4, "sharding_types": ("grid_shard",)}, "sharding_types=('grid_shard',)"),
        ],
    )
    def test_a_table_without_any_way_is_named(self, fields, named):
        with pytest.raises(PlanError) as error:
            space(described(name="other"), described(**fields))
        dim = fields.get("dim", 16)
        assert str(error.value) == (
            f"table t: no way to shard 1000 x {dim} (pooled) over 4 ranks of 2 a host satisfies {named}; "
            "relax one of them"
        )


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (2, "cuts 2 rows into blocks of 1, which leaves 2 of 4 ranks without a row"),
        (5, "cuts 5 rows into blocks of 2, which leaves 1 of 4 ranks without a row"),
    ],
)
def test_a_row_wise_table_that_would_leave_ranks_without_rows(rows, named):
    table = described(rows=rows, sharding_types=("row_wise",))
    with pytest.raises(PlanError) as error:
        space(table, topology=replace(FOUR, device="cpu"))
    assert str(error.value) == (
        f"table t: row_wise {named}, and fbgemm's CPU kernels need one; use fewer ranks, or let this table have "
        "another sharding type (planner.tables.t=auto, or sharding_types in an inventory)"
    )
    assert space(table, topology=replace(FOUR, device="cuda")).tables == 1


class TestLatencies:
    def test_are_those_of_the_topology_but_for_replicas(self):
        group = dict(zip(SHARDING_TYPES, space(described()).group_seconds_S, strict=True))
        assert group.pop("data_parallel") == 0
        assert list(group.values()) == pytest.approx([4 * (1e-5 + 3 * 0.2e-6)] * 6)

    def test_one_rank_has_none(self):
        assert not space(described(), topology=replace(FOUR, ranks=1, ranks_per_host=1)).group_seconds_S.any()


@pytest.mark.parametrize(
    ("sharding_type", "parts"),
    [
        ("data_parallel", 1),
        ("table_wise", 1),
        ("column_wise", 1),
        ("row_wise", 4),
        ("table_row_wise", 2),
        ("grid_shard", 2),
    ],
)
def test_row_parts(sharding_type, parts):
    assert row_parts(sharding_type, FOUR) == parts


def one(**fields) -> TableConfig:
    return TableConfig.model_validate({"name": "t", "rows": 1000, "dim": 16, **fields})


def of(*tables: TableConfig, batch: int = 8) -> InventoryConfig:
    return InventoryConfig(rank_batch_size=batch, tables=tables)


def test_totals_are_exact_where_few_ids_repeat():
    inventory = of(one(rows=5, ids_per_example=0.3, skew=2.0, sharding_types=("row_wise",)), batch=1)
    topology = machine(2, 2, "cuda")
    options = search_space(inventory, topology)
    placement = Placement("t", "row_wise", "fused", (0, 1))
    costs = placement_costs(traffic(inventory, topology)[0], inventory.tables[0], placement, inventory, topology)
    assert options.total_seconds_O[0] == pytest.approx(costs.seconds.sum(), rel=1e-9)


def test_an_only_table_without_a_way():
    with pytest.raises(PlanError, match="table t: no way to shard"):
        search_space(of(one(min_shards=9)), machine(4, 2))


@pytest.mark.parametrize("kernels", [("fused_uvm",), ("fused_uvm_caching",)])
def test_a_table_that_must_be_offloaded_is_not_replicated(kernels):
    options = search_space(of(one(rows=10, kernels=kernels)), machine(4, 2))
    assert {KERNELS[kernel] for kernel in options.kernel_O} == set(kernels)


@pytest.mark.parametrize(
    "fields",
    [
        {"ranks": (1, 2, 3), "sharding_types": ("grid_shard",)},
        {"ranks": (0, 2), "sharding_types": ("table_column_wise",), "min_shards": 2},
        {"ranks": (1, 1, 1), "sharding_types": ("column_wise",), "min_shards": 3},
    ],
)
def test_ranks_that_a_type_cannot_use_are_a_fault_of_the_constraint(fields):
    with pytest.raises(PlanError, match="no way to shard"):
        search_space(of(one(name="u"), one(dim=32, **fields)), machine(4, 2))
