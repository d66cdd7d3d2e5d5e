"""Plan files: read back equal, and refused with one line where they are not whole or not for this run."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.config.inventory import (
    AnyShardingType,
    DLRMDense,
    GivenDense,
    InventoryConfig,
    Kernel,
    LossInventory,
    TableConfig,
    TowerDense,
)
from gr.config.towers import SASRecConfig, STUConfig
from gr.errors import PlanError
from gr.planner.placement import Placement, Plan
from gr.planner.plan import search
from gr.planner.planfile import check_plan, dump_plan, load_plan, model_hash, parse_plan, placement_fault, topology_hash
from tests.support.plans import hand_made, machine

FOUR = machine(4, 2)
AGAIN = "make the plan again with `gr plan --json`"
TABLES = (
    TableConfig(name="a", rows=100, dim=16),
    TableConfig(name="b", rows=1000, dim=20),
    TableConfig(name="c", rows=10, dim=8),
)
PLACEMENTS = (
    Placement("a", "table_row_wise", "fused", (2, 3)),
    Placement("b", "column_wise", "fused", (0, 3, 1), 8),
    Placement("c", "row_wise", "fused_uvm", (0, 1, 2, 3)),
)
PLAN = hand_made(TABLES, PLACEMENTS, FOUR)
STU = TowerDense(tower=STUConfig(layers=2, heads=2, qk_dim=4, v_dim=4), dim=8, mean_length=5.5, max_length=10)
SASREC = TowerDense(tower=SASRecConfig(heads=2, ffn_dim=16), dim=8, mean_length=5.0, max_length=10)
DLRM = DLRMDense(dim=16, bottom=(32, 16), top=(8, 1))


@st.composite
def jobs(draw: st.DrawFn) -> InventoryConfig:
    ids = st.floats(0.01, 100)
    tables = tuple(
        TableConfig(
            name=draw(st.text(min_size=1, max_size=4)) + str(index),
            rows=draw(st.integers(1, 10**6)),
            dim=16,
            dtype=draw(st.sampled_from(["fp32", "fp16", "bf16"])),
            kind=draw(st.sampled_from(["pooled", "sequence"])),
            ids_per_example=draw(ids),
            skew=draw(st.floats(0, 2)),
            cacheability=draw(st.none() | st.floats(0, 0.8)),
            kernels=draw(st.sampled_from([("fused",), ("fused", "fused_uvm_caching")])),
            ranks=draw(st.sampled_from([None, None, (0, 1)])),
            max_shards=draw(st.sampled_from([None, 2])),
        )
        for index in range(draw(st.integers(1, 4)))
    )
    return InventoryConfig(
        name=draw(st.text(max_size=5)),
        global_batch_size=draw(st.integers(1, 10_000)),
        dense=draw(st.sampled_from([GivenDense(), STU, SASREC, DLRM])),
        loss=draw(st.sampled_from([LossInventory(), LossInventory(scores_per_example=2.5, tokens_at_once=7)])),
        tables=tables,
    )


def edited(change: Callable[[dict[str, Any]], object], plan: Plan = PLAN) -> str:
    content = json.loads(dump_plan(plan))
    change(content)
    return json.dumps(content)


def refusal(text: str) -> str:
    with pytest.raises(PlanError) as error:
        parse_plan(text, "p.json")
    assert "\n" not in str(error.value)
    return str(error.value)


class TestRoundTrip:
    @pytest.mark.slow
    @given(jobs(), st.sampled_from([machine(2), FOUR, machine(3), machine(1)]))
    @settings(max_examples=30)
    def test_of_any_plan(self, inventory, topology):
        tables = tuple(t.model_copy(update={"ranks": None}) if topology.ranks == 1 else t for t in inventory.tables)
        plan = search(inventory.model_copy(update={"tables": tables}), topology)
        assert parse_plan(dump_plan(plan)) == plan
        assert dump_plan(parse_plan(dump_plan(plan))) == dump_plan(plan)

    def test_of_a_plan_by_hand(self):
        assert parse_plan(dump_plan(PLAN)) == PLAN

    def test_figures_for_readers_are_ignored(self):
        text = dump_plan(PLAN, {"step_seconds": 0.25, "hbm_bytes": [1, 2]})
        assert json.loads(text)["predicted"] == {"step_seconds": 0.25, "hbm_bytes": [1, 2]}
        assert parse_plan(text) == PLAN

    def test_of_a_file(self, tmp_path: Path):
        (tmp_path / "p.json").write_text(dump_plan(PLAN))
        assert load_plan(tmp_path / "p.json") == PLAN

    def test_a_placement_has_a_line_and_all_ranks_a_word(self):
        lines = [line for line in dump_plan(PLAN).splitlines() if '"sharding_type"' in line]
        assert len(lines) == 3
        assert json.loads(lines[2].strip(" ,"))["ranks"] == "all"

    def test_the_order_of_placements_in_a_file_is_free(self):
        assert parse_plan(edited(lambda content: content["placements"].reverse())) == PLAN


class TestUnreadable:
    def test_no_file(self, tmp_path: Path):
        path = tmp_path / "none.json"
        with pytest.raises(PlanError) as error:
            load_plan(path)
        assert str(error.value) == (
            f"{path}: cannot be read: No such file or directory; write one with `gr plan CONFIG --json {path}`"
        )

    def test_no_text(self, tmp_path: Path):
        (tmp_path / "p.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(PlanError, match="cannot be read: not a text file"):
            load_plan(tmp_path / "p.json")

    def test_no_json(self):
        assert refusal('{\n "format": oops}') == f"p.json: line 2 is not JSON: Expecting value; {AGAIN}"
        assert refusal("").startswith("p.json: line 1 is not JSON")

    def test_what_python_does_not_convert(self):
        assert refusal("1" * 5000).startswith("p.json: Exceeds the limit")
        assert refusal("[" * 100_000).startswith("p.json: nested too deep")
        nested = edited(lambda c: c.update(predicted={"a": "HERE"})).replace('"HERE"', "[" * 800 + "]" * 800)
        assert refusal(nested).endswith(AGAIN)
        assert refusal(dump_plan(PLAN).replace('"by hand"', '"\\ud800"')).startswith("p.json: invalid json: ")

    @pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"format": "gr-plan-0"}', '{"format": ["gr-plan-1"]}'])
    def test_another_format(self, text):
        expected = "p.json: not a plan of this version (gr-plan-1); make it again with `gr plan --json`"
        assert refusal(text) == expected

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.pop("placements"), "placements: field required"),
            (lambda c: c.pop("model_hash"), "model_hash: field required"),
            (lambda c: c.update(more=1), "more: extra inputs are not permitted"),
            (lambda c: c["placements"][1].update(ranks="some"), "placements.1.ranks"),
            (lambda c: c["placements"][0].update(sharding_type="diagonal"), "placements.0.sharding_type"),
            (lambda c: c["placements"][0].update(kernel="magic"), "placements.0.kernel"),
            (lambda c: c["placements"][0].update(rank=3), "placements.0.rank: extra inputs are not permitted"),
            (lambda c: c["inventory"]["tables"][0].update(rows=0), "inventory.tables.0.rows: input should be greater"),
            (lambda c: c["inventory"]["tables"][0].update(dim=-4), "inventory.tables.0.dim: input should be greater"),
            (lambda c: c["inventory"]["tables"][0].update(rows="100"), "inventory.tables.0.rows: input should be a"),
            (lambda c: c["topology"].pop("ranks"), "topology.ranks: field required"),
            (lambda c: c["topology"].update(more=1), "topology.more: unexpected keyword argument"),
            (lambda c: c["topology"].update(ranks="4"), "topology.ranks: input should be a valid integer"),
            (lambda c: c["topology"].update(ranks=10**9), "topology.ranks: input should be less than"),
            (lambda c: c["topology"].update(device="tpu"), "topology.device: input should be 'cuda' or 'cpu'"),
            (lambda c: c["topology"].update(hbm_bytes=10**400), "topology.hbm_bytes: input should be less than"),
            (lambda c: c["topology"].update(hbm_bandwidth=0), "topology.hbm_bandwidth: input should be greater"),
            (lambda c: c["topology"].update(intra_bandwidth=-5.0), "topology.intra_bandwidth: input should be greater"),
            (lambda c: c["topology"].update(flops_bf16=math.nan), "topology.flops_bf16: input should be a finite"),
            (lambda c: c["topology"].update(inter_latency=math.inf), "topology.inter_latency: input should be a fin"),
            (lambda c: c["topology"].update(reserve_bytes=-1), "topology.reserve_bytes: input should be greater"),
            (lambda c: c.update(bound_seconds=math.nan), "bound_seconds: input should be a finite number"),
            (lambda c: c.update(bound_seconds=-1.0), "bound_seconds: input should be greater"),
            (lambda c: c["inventory"]["tables"][0].update(skew=math.nan), "inventory.tables.0.skew: input should be"),
            (lambda c: c["inventory"].update(rank_batch_size=10**29), "inventory.rank_batch_size: input should be l"),
        ],
    )
    def test_a_part_is_missing_or_wrong(self, change, message):
        refused = refusal(edited(change))
        assert refused.startswith(f"p.json: {message}") and refused.endswith(AGAIN)


class TestNotWhole:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c["placements"].pop(1), f"has no placement for table b; {AGAIN}"),
            (lambda c: c["placements"].clear(), f"has no placement for table a; {AGAIN}"),
            (lambda c: c["placements"].append(c["placements"][2]), "table c is placed twice"),
            (lambda c: c["placements"][1].update(table="x"), "places x, which is no table of its inventory"),
            (lambda c: c["placements"][1].update(ranks=[0, 4, 1]), "table b: rank 4 is not one of 0 to 3"),
            (lambda c: c["placements"][1].update(ranks=[0, -1, 1]), "table b: rank -1 is not one of 0 to 3"),
            (
                lambda c: c["placements"][1].update(ranks=[0, 1]),
                "table b: column_wise has 3 shards here, and ranks names 2",
            ),
            (lambda c: c["placements"][1].update(ranks=[0, 1, 1]), "table b: two of its shards are on one rank"),
            (
                lambda c: c["placements"][1].update(column_width=6),
                "table b: column_width=6 is not a multiple of 4 up to dim=20",
            ),
            (
                lambda c: c["placements"][2].update(ranks=[1, 0, 2, 3]),
                "table c: row_wise has a shard on every rank, in order; ranks does not",
            ),
        ],
    )
    def test_a_placement_is_missing_or_impossible(self, change, message):
        assert refusal(edited(change)) == f"p.json: {message}"

    def test_an_edited_inventory(self):
        message = refusal(edited(lambda c: c["inventory"]["tables"][0].update(rows=200)))
        stated = model_hash(PLAN.inventory)
        assert message.startswith(f"p.json: model_hash says {stated}, its content is ") and "it was edited" in message

    def test_ranks_that_fill_no_hosts(self):
        message = refusal(edited(lambda c: c["topology"].update(ranks_per_host=3)))
        assert message == "p.json: 4 ranks do not fill hosts of 3"

    def test_an_edited_topology(self):
        message = refusal(edited(lambda c: c["topology"].update(ranks=8)))
        stated, actual = topology_hash(FOUR), topology_hash(machine(8, 2))
        expected = f"p.json: topology_hash says {stated}, its content is {actual}: it was edited; make the plan again"
        assert message == expected


class TestPlacementFault:
    TABLE = TableConfig(name="t", rows=100, dim=16)

    @staticmethod
    def placed(sharding_type: AnyShardingType, ranks: tuple[int, ...], width: int | None) -> Placement:
        kernel: Kernel = "dense" if sharding_type == "data_parallel" else "fused"
        return Placement("t", sharding_type, kernel, ranks, width)

    @pytest.mark.parametrize(
        ("sharding_type", "ranks", "width"),
        [
            ("data_parallel", (0, 1, 2, 3), None),
            ("table_wise", (3,), None),
            ("column_wise", (3, 0), 8),
            ("column_wise", (3, 0), 12),  # a narrower last block
            ("column_wise", (2,), 16),
            ("row_wise", (0, 1, 2, 3), None),
            ("table_row_wise", (0, 1), None),
            ("table_column_wise", (3, 2), 8),
            ("grid_shard", (2, 3, 0, 1), 8),
        ],
    )
    def test_none(self, sharding_type, ranks, width):
        assert placement_fault(self.TABLE, self.placed(sharding_type, ranks, width), FOUR) is None

    @pytest.mark.parametrize(
        ("sharding_type", "ranks", "width", "fault"),
        [
            ("data_parallel", (0, 1), None, "data_parallel has 4 shards here, and ranks names 2"),
            ("data_parallel", (3, 2, 1, 0), None, "data_parallel has a shard on every rank, in order; ranks does not"),
            ("table_wise", (0, 1), None, "table_wise has 1 shards here, and ranks names 2"),
            ("table_wise", (), None, "table_wise has 1 shards here, and ranks names 0"),
            ("table_wise", (0,), 8, "column_width=8 does not go with table_wise"),
            ("column_wise", (0,), None, "column_width=None does not go with column_wise"),
            ("column_wise", (0,), 0, "column_width=0 is not a multiple of 4 up to dim=16"),
            ("column_wise", (0,), 20, "column_width=20 is not a multiple of 4 up to dim=16"),
            ("column_wise", (0, 0), 8, "two of its shards are on one rank"),
            ("table_column_wise", (1, 2), 8, "table_column_wise stays on one host; ranks does not"),
            ("table_row_wise", (1, 0), None, "table_row_wise takes all ranks of a host, in order; ranks does not"),
            ("table_row_wise", (0, 2), None, "table_row_wise takes all ranks of a host, in order; ranks does not"),
            ("grid_shard", (0, 2, 1, 3), 8, "grid_shard takes all ranks of a host, in order; ranks does not"),
            ("grid_shard", (0, 3, 2, 1), 8, "grid_shard takes all ranks of a host, in order; ranks does not"),
            ("table_row_wise", (0, 3), None, "table_row_wise takes all ranks of a host, in order; ranks does not"),
            ("grid_shard", (0, 1, 0, 1), 8, "two of its shards are on one rank"),
        ],
    )
    def test_one(self, sharding_type, ranks, width, fault):
        assert placement_fault(self.TABLE, self.placed(sharding_type, ranks, width), FOUR) == fault

    def test_kernels(self):
        everywhere = (0, 1, 2, 3)
        for kernel in ("fused", "fused_uvm", "fused_uvm_caching"):
            fault = placement_fault(self.TABLE, Placement("t", "data_parallel", kernel, everywhere), FOUR)
            assert fault == f"data_parallel has kernel dense, not {kernel}"
        dense = Placement("t", "row_wise", "dense", everywhere)
        assert placement_fault(self.TABLE, dense, FOUR) == (
            "row_wise does not go with kernel dense, unless the table's kernels allow it: fused"
        )
        allowed = self.TABLE.model_copy(update={"kernels": ("fused", "dense")})
        assert placement_fault(allowed, dense, FOUR) is None

    @pytest.mark.parametrize("sharding_type", ["table_row_wise", "table_column_wise", "grid_shard"])
    def test_sequence_tables_know_four_types(self, sharding_type):
        table = self.TABLE.model_copy(update={"kind": "sequence"})
        fault = placement_fault(table, Placement("t", sharding_type, "fused", (0, 1)), FOUR)
        assert fault == f"{sharding_type} does not exist for sequence tables"

    def test_grids_of_means_are_wrong(self):
        table = self.TABLE.model_copy(update={"pooling": "mean"})
        fault = placement_fault(table, Placement("t", "grid_shard", "fused", (0, 1, 2, 3), 8), FOUR)
        assert fault == "grid_shard computes wrong results with pooling=mean in torchrec 1.8"


class TestHashes:
    @pytest.mark.parametrize(
        "change",
        [
            {"name": "another run"},
            {"rank_batch_size": 4096},
            {"comm_dtype": {"forward": "bf16"}},
            {"index_dedup": True},
            {"loss": LossInventory(scores_per_example=9.0)},
        ],
    )
    def test_a_plan_serves_runs_of_another_batch_or_name(self, change):
        assert model_hash(PLAN.inventory.model_copy(update=change)) == model_hash(PLAN.inventory)
        check_plan(PLAN, PLAN.inventory.model_copy(update=change), FOUR)

    @pytest.mark.parametrize(
        "change",
        [
            {"skew": 1.2},
            {"ids_per_example": 7.0},
            {"cacheability": 0.1},
            {"sharding_types": ("row_wise",)},
            {"ranks": (0,)},
        ],
    )
    def test_statistics_and_wishes_are_no_part_of_the_model(self, change):
        assert model_hash(self.changed(change)) == model_hash(PLAN.inventory)

    @pytest.mark.parametrize(
        "change",
        [
            {"name": "z"},
            {"rows": 101},
            {"dim": 32},
            {"dtype": "fp16"},
            {"kind": "sequence"},
            {"pooling": "mean"},
            {"features": 2},
            {"optimizer": "sgd"},
        ],
    )
    def test_shapes_and_optimizers_are(self, change):
        assert model_hash(self.changed(change)) != model_hash(PLAN.inventory)

    def test_the_dense_part_is(self):
        assert model_hash(PLAN.inventory.model_copy(update={"dense": STU})) != model_hash(PLAN.inventory)

    def test_better_known_figures_are_no_other_topology(self):
        assert topology_hash(replace(FOUR, hbm_bandwidth=3e12, name="measured")) == topology_hash(FOUR)
        for other in (machine(4, 4), machine(8, 2), machine(4, 2, device="cuda")):
            assert topology_hash(other) != topology_hash(FOUR)

    @staticmethod
    def changed(change: dict[str, object]) -> InventoryConfig:
        first = TABLES[0].model_copy(update=change)
        return PLAN.inventory.model_copy(update={"tables": (first, *TABLES[1:])})


class TestAnotherRun:
    def test_of_this_model_and_topology(self):
        check_plan(PLAN, PLAN.inventory, FOUR)

    def test_more_than_its_own_topology_holds(self):
        for memory, message in (("hbm_bytes", " of 10 bytes, and"), ("host_bytes", " bytes to 10 of host memory")):
            with pytest.raises(PlanError) as error:
                check_plan(replace(PLAN, topology=replace(FOUR, **{memory: 10})), PLAN.inventory, FOUR)
            assert str(error.value).startswith("the plan does not fit its own topology: rank ")
            assert message in str(error.value)

    def test_another_model(self):
        other = TestHashes.changed({"rows": 5000})
        with pytest.raises(PlanError) as error:
            check_plan(PLAN, other, FOUR)
        assert str(error.value) == (
            f"the plan is for another model: {model_hash(PLAN.inventory)} (3 tables, b of 1000 x 20 fp32 "
            f"rowwise_adagrad, given dense part), and this run has {model_hash(other)} (3 tables, a of 5000 x 16 fp32 "
            "rowwise_adagrad, given dense part); make one with `gr plan CONFIG --json`"
        )

    def test_another_topology(self):
        other = machine(8, 4, device="cuda")
        with pytest.raises(PlanError) as error:
            check_plan(PLAN, PLAN.inventory, other)
        assert str(error.value) == (
            f"the plan is for another topology: {topology_hash(FOUR)} (cpu, 4 ranks of 2 a host), and this run has "
            f"{topology_hash(other)} (cuda, 8 ranks of 4 a host); make one with `gr plan CONFIG --json`"
            ", or let the run make one with planner.replan=true"
        )
