"""Inventories from lists of tables and from experiments, and the published sizes of configs/scale."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.config.inventory import InventoryConfig
from gr.errors import ConfigError
from gr.planner.estimate_dense import dense_work
from gr.planner.inventory import is_inventory, load_inventory
from tests.support.schemas import item_schema
from tests.support.tiny import tiny_config

ROOT = Path(__file__).parents[3]
SCALE = ROOT / "configs" / "scale"
TABLES = [
    {"name": "users", "rows": 1000, "dim": 64},
    {"name": "items", "rows": 5000, "dim": 128, "kind": "sequence", "skew": 1.05, "sharding_types": ["row_wise"]},
]
BATCH = "rank_batch_size=32"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_json(content: object) -> str:
    Path("tables.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return "tables.json"


def write_parquet(rows: list[dict], schema: pa.Schema | None = None) -> str:
    columns = {name: None for row in rows for name in row}
    pq.write_table(pa.Table.from_pylist([{**columns, **row} for row in rows], schema=schema), "tables.parquet")
    return "tables.parquet"


def write_yaml(rows: str) -> str:
    Path("i.yaml").write_text(f"tables: [{{name: a, {rows}, dim: 4}}]")
    return "i.yaml"


def fault(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_inventory(path, overrides or (BATCH,))
    return str(caught.value)


class TestLists:
    def test_json_and_parquet_read_alike(self):
        both = [load_inventory(path, [BATCH]) for path in (write_json(TABLES), write_parquet(TABLES))]
        assert both[0] == both[1]
        assert both[0].rank_batch_size == 32
        users, items = both[0].tables
        assert (users.skew, users.kind, users.sharding_types) == (0.0, "pooled", None)
        assert (items.skew, items.kind, items.sharding_types) == (1.05, "sequence", ("row_wise",))

    def test_a_whole_inventory_in_json(self):
        assert load_inventory(write_json({"rank_batch_size": 8, "tables": TABLES})).rank_batch_size == 8

    def test_integers_that_became_floats_beside_a_gap(self):
        rows = [{**TABLES[0], "max_shards": 4.0}, {**TABLES[1], "max_shards": None}]
        assert load_inventory(write_parquet(rows), [BATCH]).tables[0].max_shards == 4

    def test_lists_are_inventories_and_experiments_are_not(self):
        assert is_inventory(write_json(TABLES))
        assert is_inventory("tables.parquet")
        assert is_inventory(SCALE / "dlrm-v4-hstu.yaml")
        assert not is_inventory(ROOT / "configs" / "retrieval" / "ml-1m-hstu.yaml")

    def test_all_else_comes_from_overrides(self):
        assert "set one of rank_batch_size" in fault(write_json(TABLES), "precision=fp32")
        assert "unknown key; did you mean 'precision'?" in fault(write_json(TABLES), BATCH, "precison=fp32")


class TestFaults:
    @pytest.mark.parametrize("write", [write_json, write_parquet])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rows": 0}, "row 2: rows: should be greater than 0, got 0"),
            ({"dim": -4}, "row 2: dim: should be greater than 0, got -4"),
            ({"dim": 6}, "row 2: dim: should be a multiple of 4, got 6"),
            ({"dim": None}, "row 2: dim: required, but not set"),
            ({"kind": "bag"}, "row 2: kind: 'bag' is not allowed; allowed: pooled, sequence"),
            ({"name": "users"}, "row 2: name: 'users' is also the table of row 1"),
            ({"sharding_types": ["row_wize"]}, "'row_wize' is not allowed; did you mean 'row_wise'?"),
            ({"sharding_types": ["grid_shard"]}, "row 2: grid_shard does not exist for sequence tables"),
        ],
    )
    def test_names_file_and_row(self, write, change, message):
        path = write([TABLES[0], {**TABLES[1], **change}])
        assert f"{path} row 2" in fault(path)
        assert message in fault(path)

    def test_columns(self):
        wrong = [{**TABLES[0], "optimiser": "sgd"}]
        assert "tables.parquet: unknown column 'optimiser'; did you mean 'optimizer'?" in fault(write_parquet(wrong))
        assert "row 1: optimiser: unknown key; did you mean 'optimizer'?" in fault(write_json(wrong))
        assert "tables.parquet: no column rows, dim; columns: name" in fault(write_parquet([{"name": "users"}]))

    def test_empty(self):
        assert "tables.json: holds no tables" in fault(write_json([]))
        schema = pa.schema({"name": pa.string(), "rows": pa.int64(), "dim": pa.int64()})
        assert "tables.parquet: holds no tables" in fault(write_parquet([], schema))

    def test_a_type_that_json_has_not(self):
        rows = [{**TABLES[0], "skew": b"1"}]
        assert "row 1: skew: expected text, a finite number or a list, got b'1'" in fault(write_parquet(rows))

    def test_numbers_that_are_none(self):
        assert "NaN is not a finite number" in fault(write_json('[{"name": "a", "rows": 1, "dim": 4, "skew": NaN}]'))
        for value in ("nan", "inf"):
            rows = [{**TABLES[0], "skew": float(value)}]
            message = f"row 1: skew: expected text, a finite number or a list, got {value}"
            assert message in fault(write_parquet(rows))

    def test_what_python_does_not_convert(self):
        huge = f'[{{"name": "a", "rows": {"1" * 5000}, "dim": 4}}]'
        assert "tables.json: Exceeds the limit" in fault(write_json(huge))
        for depth, where in ((300, "tables.json row 1"), (100_000, "tables.json")):
            nested = '[{"name": "a", "rows": 1, "dim": 4, "ranks": ' + "[" * depth + "]" * depth + "}]"
            assert f"{where}: nested too deep" in fault(write_json(nested))
        assert "i.yaml: not a usable number: Exceeds the limit" in fault(write_yaml(f"rows: 0x{'f' * 5000}"))

    def test_tables_misspelt(self):
        Path("i.yaml").write_text("rank_batch_size: 8\ntabels: []")
        with pytest.raises(ConfigError, match=r"i\.yaml:2: tabels: unknown key; did you mean 'tables', of an inv"):
            is_inventory("i.yaml")

    def test_unreadable(self):
        assert "tables.json: line 1 is not JSON" in fault(write_json("[{"))
        twice = '[{"name": "a", "rows": 1, "rows": 2, "dim": 4}]'
        assert "tables.json: an object has the key 'rows' twice; keep one" in fault(write_json(twice))
        assert "expected a list of tables" in fault(write_json("3"))
        assert "row 1: expected a table" in fault(write_json([3]))
        assert "none.parquet: cannot be read" in fault("none.parquet")
        assert "none.json: cannot be read" in fault("none.json")
        assert "none.yaml: no such file" in fault("none.yaml")
        Path("tables.parquet").write_text("no parquet at all")
        assert "tables.parquet: not a Parquet file" in fault("tables.parquet")

    def test_many_faults_are_counted(self):
        message = fault(write_json([{"name": f"t{i}", "rows": 0, "dim": 4} for i in range(50)]))
        assert message.count("rows: should be greater") == 20
        assert "and 30 faults more" in message


class TestExperiments:
    def test_batch_dtypes_and_lengths(self):
        config = tiny_config(Path("data"), Path("runs"))
        inventory = config.inventory(item_schema(61))
        assert (inventory.global_batch_size, inventory.precision) == (16, "fp32")
        assert (inventory.tables[0].dtype, inventory.tables[0].optimizer) == ("fp32", "adam")
        assert dense_work(inventory, 4).tokens == 4 * 16

    @pytest.mark.parametrize(
        ("kind", "rows", "ids_per_example", "ids_per_step", "scores"),
        [
            ({"kind": "per_position", "count": 6}, 61, 5, 60, 5 * 7),
            ({"kind": "per_position", "count": 6}, 70_001, 5 + 5 * 7, 0, 5 * 7),
            ({"kind": "shared", "count": 6}, 61, 5 + 5, 6, 5 * 7),
            ({"kind": "in_batch"}, 61, 5, 60, 5 * 60),
            ({"kind": "in_batch"}, 1001, 5, 80, 5 * 80),
            ({"kind": "full"}, 61, 5, 60, 5 * 60),
        ],
    )
    def test_candidates(self, kind, rows, ids_per_example, ids_per_step, scores):
        config = tiny_config(Path("data"), Path("runs"), task={"negatives": kind}, data={"max_length": 5})
        inventory = config.inventory(item_schema(rows))
        table = inventory.tables[0]
        assert (table.ids_per_example, table.ids_per_step) == (ids_per_example, ids_per_step)
        assert inventory.loss.scores_per_example == scores
        assert inventory.loss.tokens_at_once == (1024 if kind["kind"] in ("full", "in_batch") else None)


class TestScale:
    """The sizes that the models are published with."""

    def load(self, name: str) -> tuple[InventoryConfig, int, int]:
        inventory = load_inventory(SCALE / f"{name}.yaml")
        return inventory, sum(t.rows for t in inventory.tables), sum(t.rows * t.dim for t in inventory.tables)

    def test_dlrm_v2(self):
        inventory, rows, parameters = self.load("dlrm-v2-criteo")
        assert (len(inventory.tables), rows, parameters) == (26, 204_184_588, 26_135_627_264)
        assert sum(table.ids_per_example for table in inventory.tables) == 214
        assert dense_work(inventory, 1).parameters == 16_044_545

    def test_dlrm_v3(self):
        inventory, rows, parameters = self.load("dlrm-v3-mlperf")
        assert (rows, parameters) == (1_010_000_128, 517_120_065_536)
        assert {(table.dim, table.dtype, table.kind) for table in inventory.tables} == {(512, "fp16", "sequence")}
        assert dense_work(inventory, 1).parameters == 16_693_585  # counted from its modules

    def test_dlrm_v4(self):
        inventory, rows, parameters = self.load("dlrm-v4-hstu")
        assert (len(inventory.tables), rows, parameters) == (11, 293_051_712, 150_042_476_544)
        assert {(table.dim, table.dtype, table.kind) for table in inventory.tables} == {(512, "fp32", "sequence")}
        assert dense_work(inventory, 1).parameters == 15_243_057  # counted from its modules

    def test_hstu(self):
        inventory, rows, parameters = self.load("hstu-1.5t")
        assert (rows, parameters) == (1_464_843_750, 1_500_000_000_000)
        # Its tokens each have a vector: items and the slower series; targets and actions come beside them.
        tokens = sum(table.ids_per_example for table in inventory.tables[1:-1])
        assert tokens == inventory.dense.mean_length
        assert inventory.loss.scores_per_example == inventory.dense.mean_length * (1 + 1024)

    def test_every_file_says_how_to_plan_it(self):
        for path in SCALE.glob("*.yaml"):
            assert f"#   gr plan configs/scale/{path.name} --topology " in path.read_text()
