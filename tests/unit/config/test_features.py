"""Features and tables by configuration: one clear line where a name or a choice does not fit."""

import re
from pathlib import Path

import pytest

from gr.config import ClickConfig, RankingConfig, dump_config, load_config
from gr.config.features import TableOptions, chosen_columns, chosen_features, columns_by_table
from gr.config.optim import Adam, RowWiseAdagrad
from gr.errors import ConfigError
from gr.planner.estimate_tables import optimizer_states
from gr.schema import RAW_IDS, SparseColumn
from tests.support import ROOT
from tests.support.schemas import tabular_schema
from tests.support.tiny_histories import SCHEMA
from tests.support.tiny_tabular import COLUMNS, DENSE, tiny_click_config

RANKING = """\
run_dir: runs/x
task: {kind: ranking, tasks: [{kind: bce, action: like}]}
data: {path: data}
trainer: {steps: 1}
model:
  features: [category, age]
embeddings:
  tables:
    category: {dtype: fp16, optimizer: {kind: rowwise_adagrad, lr: 1e-2}}
    country: {table: category}
"""
CLICK = """\
run_dir: runs/x
task: {kind: click}
data: {path: data}
model: {dim: 8, bottom: [8], top: [1]}
trainer: {steps: 1}
"""


@pytest.fixture
def ranking(tmp_path: Path) -> str:
    (tmp_path / "ranking.yaml").write_text(RANKING)
    return str(tmp_path / "ranking.yaml")


def test_what_is_written_reads_back(ranking: str, tmp_path: Path) -> None:
    config = load_config(ranking, ["embeddings.tables.item_id.optimizer={kind: adam}"])
    assert isinstance(config, RankingConfig)
    assert config.model.features == ("category", "age")
    own = config.embeddings.tables
    assert own["category"] == TableOptions(dtype="fp16", optimizer=RowWiseAdagrad(lr=1e-2))
    assert own["item_id"].optimizer == Adam() and own["country"] == TableOptions(table="category")
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.features=[age,age]", "ranking.yaml:6: model.features: names age twice"),
        ("model.features=age", "model.features: expected a list, like [a, b], got 'age'"),
        ("embeddings.tables.category.dtyp=fp16", "embeddings.tables.category.dtyp: unknown key; did you mean 'dtype'?"),
        ("embeddings.tables.category.dtype=bf16", "embeddings.tables.category.dtype: 'bf16' is not allowed"),
        ("embeddings.tables.category.optimizer.kind=sdg", "unknown kind 'sdg'; did you mean 'sgd'?"),
        ("embeddings.tables.country.dtype=fp16", "table=category shares a table: set dtype of category instead"),
    ],
)
def test_a_fault_names_its_place(ranking: str, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ranking, [override])
    assert said.removeprefix("ranking.yaml:6: ") in str(caught.value) and str(caught.value).count("\n") <= 1


def test_the_section_of_the_guide_is_what_it_says(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(model:\n.*?)```", (ROOT / "docs/config.md").read_text(), re.DOTALL)
    (tmp_path / "guide.yaml").write_text(RANKING[: RANKING.index("model:")] + block)
    config = load_config(tmp_path / "guide.yaml")
    assert isinstance(config, RankingConfig)
    columns = {"event_features": {"genre": 19, "tag": 7}, "contextual": {"viewed_genre": 19, "country": 5}}
    schema = chosen_features(SCHEMA.model_copy(update=columns), config.model.features)
    tables = config.tables(schema)
    assert {table.name: (table.features, table.dtype, table.optimizer) for table in tables} == {
        "item_id": (1, "fp32", "rowwise_adagrad"),
        "genre": (2, "fp16", "adam"),
    }
    assert schema.contextual_numeric == ["age"]


def test_columns_of_click(tmp_path: Path) -> None:
    (tmp_path / "click.yaml").write_text(CLICK)
    config = load_config(tmp_path / "click.yaml", ["model.features=[i1,c1]"])
    assert isinstance(config, ClickConfig) and config.model.features == ("i1", "c1")


def test_features_keep_the_order_of_the_data() -> None:
    assert chosen_features(SCHEMA, None) is SCHEMA
    chosen = chosen_features(SCHEMA, ["age", "country", "item_id"])
    assert (chosen.event_features, chosen.contextual, chosen.contextual_numeric) == ({}, {"country": 45}, ["age"])
    rows = chosen_columns(tabular_schema(COLUMNS, DENSE), ["c3", "c1", "i3", "i1"])
    assert rows.dense == ["i1", "i3"] and [column.name for column in rows.sparse] == ["c1", "c3"]


def test_an_unknown_feature_is_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        chosen_features(SCHEMA, ["age", "categry"])
    assert str(caught.value) == (
        "model.features: tiny-histories (schema.json) has no feature categry; did you mean 'category'? "
        "(it has: item_id, category, country, age)"
    )
    with pytest.raises(ConfigError, match=r"rows .* has no feature zzz; it has: i1, i2, i3, c1, c2, c3$"):
        chosen_columns(tabular_schema(COLUMNS, DENSE), ["zzz"])
    with pytest.raises(ConfigError, match=r"no dense column, DLRM needs one: name one of i1, i2, i3$"):
        chosen_columns(tabular_schema(COLUMNS, DENSE), ["c1"])
    with pytest.raises(ConfigError, match=r"no sparse column, DLRM needs one: name one of c1, c2, c3$"):
        chosen_columns(tabular_schema(COLUMNS, DENSE), ["i1"])


def test_columns_of_shared_tables() -> None:
    rows = {"a": 5, "b": 5, "c": 6, "d": 5}
    shared = {"a": TableOptions(table="d"), "b": TableOptions(table="d"), "d": TableOptions(dtype="fp16")}
    assert columns_by_table(rows, {}) == {name: (name,) for name in rows}
    assert columns_by_table(rows, shared) == {"c": ("c",), "d": ("d", "a", "b")}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"categori": {}}, "embeddings.tables: the model has no feature categori; did you mean 'category'? (it has: "),
        ({"b": {"table": "f"}}, "embeddings.tables.b.table: the model has no feature f; it has: a, b, category"),
        ({"a": {"table": "a"}}, "embeddings.tables.a.table=a: name a column that has a table of its own, or unset it"),
        ({"a": {"table": "b"}, "b": {"table": "a"}}, "table=b: name a column that has a table of its own"),
        ({"a": {"table": "category"}}, "category has 6 ids and a 5; columns that share a table have the same ids"),
    ],
)
def test_a_table_that_cannot_be_shared_is_one_line(options: dict, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        columns_by_table({"a": 5, "b": 5, "category": 6}, {k: TableOptions(**own) for k, own in options.items()})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_ids_of_a_table() -> None:
    """The rows are those of the ids, whatever the largest id; raw ids cannot be rows."""
    columns = (SparseColumn(name="c1", cardinality=RAW_IDS), *COLUMNS[1:])
    schema = tabular_schema(columns, DENSE)
    config = tiny_click_config(Path("unused"), Path("unused"))
    with pytest.raises(ConfigError, match=r"c1 has raw ids .* set embeddings\.tables\.c1\.ids to \{kind: dynamic"):
        config.tables(schema)
    ids = {"c1": {"ids": {"kind": "dynamic", "rows": 128}}, "c2": {"ids": {"kind": "hashed", "rows": 9}}}
    tables = tiny_click_config(Path("unused"), Path("unused"), embeddings={"tables": ids}).tables(schema)
    assert [(table.rows, table.ids) for table in tables] == [(128, "dynamic"), (9, "hashed"), (23, "dense")]
    states = [optimizer_states(table)[1] for table in tables]
    assert states == [4, 0, 0], "16 bytes a row, as four numbers"


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ({"kind": "dynamic", "rows": 100}, "rows=100 is no multiple of ways=64: set rows=128"),
        ({"kind": "dynamic", "rows": 128, "min_count": 256}, "less than or equal to 255"),
        ({"kind": "hashed", "rows": 128, "ways": 2}, "Extra inputs"),
    ],
)
def test_ids_that_cannot_be_are_one_line(ids: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TableOptions.model_validate({"ids": ids})
