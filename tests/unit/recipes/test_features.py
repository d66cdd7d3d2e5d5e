"""Features and tables by configuration: a column is added or left out by editing YAML, not data."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import gr
from gr.config import RunConfig
from gr.dist import World
from gr.embeddings import table_weights
from gr.errors import CheckpointError, ConfigError, DataError
from gr.experiment import evaluate, train
from gr.schema import DataSchema, SparseColumn, TabularSchema, vocabulary_file
from tests.support.tiny_histories import tiny_ranking_config, write_histories, write_twins
from tests.support.tiny_tabular import COLUMNS, tiny_click_config, write_tiny_tabular

SHORT = {"steps": 3}


def without(folder: Path, out: Path, columns: list[str]) -> Path:
    """A copy of a data folder without these columns."""
    out.mkdir()
    for file in folder.glob("*.parquet"):
        table = pq.read_table(file)
        rows = pq.ParquetFile(file).metadata.row_group(0).num_rows
        pq.write_table(
            table.drop_columns([n for n in columns if n in table.column_names]), out / file.name, row_group_size=rows
        )
    fields = json.loads((folder / "schema.json").read_text())
    for name, value in fields.items():
        if isinstance(value, list):
            fields[name] = [each for each in value if (each["name"] if isinstance(each, dict) else each) not in columns]
        elif isinstance(value, dict):
            fields[name] = {key: each for key, each in value.items() if key not in columns}
    (out / "schema.json").write_text(json.dumps(fields))
    return out


def figures(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    of_the_machine = ("second", "seconds", "time", "bytes")
    return [{k: v for k, v in line.items() if not k.endswith(of_the_machine)} for line in lines]


def ranking(data: Path, run_dir: Path, **sections: object) -> RunConfig:
    return tiny_ranking_config(data, run_dir, **{"trainer": SHORT, **sections})


def click(data: Path, run_dir: Path, **sections: object) -> RunConfig:
    return tiny_click_config(data, run_dir, **{"trainer": SHORT, "evaluation": {"path": str(data)}, **sections})


def write_rows(folder: Path) -> Path:
    return write_tiny_tabular(folder, columns=(*COLUMNS, SparseColumn(name="c4", cardinality=64)))


def write_users(folder: Path) -> Path:
    write_histories(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "configure", "features", "left_out"),
    [
        (write_users, ranking, ["country"], ["category", "age"]),
        (write_users, ranking, ["age", "category"], ["country"]),
        (write_rows, click, ["c4", "i3", "i1", "c2"], ["i2", "c1", "c3"]),
    ],
)
def test_choosing_features_is_training_on_data_without_the_others(
    tmp_path: Path, alone: World, write: Callable, configure: Callable, features: list[str], left_out: list[str]
) -> None:
    """Every loss and metric is the same, bit for bit, and so is what the checkpoint predicts."""
    full = write(tmp_path / "full")
    less = without(full, tmp_path / "less", left_out)
    chosen = configure(full, tmp_path / "chosen", model={"features": features})
    reports = [train(chosen, alone), train(configure(less, tmp_path / "rest"), alone)]
    assert len(figures(tmp_path / "chosen")) > 3
    assert figures(tmp_path / "chosen") == figures(tmp_path / "rest")
    assert reports[0] is not None and reports[1] is not None and reports[0]["model"] == reports[1]["model"]
    saved, other = gr.load(tmp_path / "chosen"), gr.load(tmp_path / "rest")
    assert not set(left_out) & set(saved.vocabularies)
    assert all(torch.equal(a, b) for a, b in zip(saved.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.slow
def test_predictions_ask_only_for_the_chosen_columns(tmp_path: Path, alone: World) -> None:
    data = write_rows(tmp_path / "data")
    train(click(data, tmp_path / "run", model={"features": ["i1", "c1"]}), alone)
    rows = {"i1": [0.5, -0.5], "c1": [3, 40]}
    scores = gr.load(tmp_path / "run").score(pa.table(rows))
    assert scores.shape == (2,) and np.isfinite(scores).all()
    train(ranking(users := write_users(tmp_path / "users"), tmp_path / "ranks", model={"features": []}), alone)
    predicted = gr.load(tmp_path / "ranks").score(pa.table({"user_id": [100, 101], "item_id": [1, 2]}), users)
    assert all(np.isfinite(values).all() for values in predicted.values())


SHARED = {"favourite": {"table": "category"}, "last_item": {"table": "item_id"}}


@pytest.mark.slow
def test_columns_share_a_table(tmp_path: Path, alone: World) -> None:
    """Both columns read it and train it, and it is saved once."""
    data = write_twins(tmp_path / "data")
    report = train(ranking(data, tmp_path / "run", embeddings={"tables": SHARED}), alone)
    assert report is not None
    saved = gr.load(tmp_path / "run")
    tables = table_weights(saved.model)
    assert list(tables) == ["item_id", "category"]
    assert evaluate(saved.config, Path(report["checkpoint"]), alone, "test")["model"] == report["model"]
    ids = {name: torch.arange(1, 5) for name in ("item_id", "category", "favourite", "last_item")}
    from torchrec import KeyedJaggedTensor

    keys = KeyedJaggedTensor(list(ids), torch.cat(list(ids.values())), lengths=torch.full((4,), 4))
    rows = saved.model.tables(keys)
    assert torch.equal(rows["favourite"].values(), rows["category"].values())
    assert torch.equal(rows["last_item"].values(), tables["item_id"][1:5])


@pytest.mark.slow
@pytest.mark.parametrize("row_weights", [False, True])
def test_click_columns_share_a_table(tmp_path: Path, alone: World, row_weights: bool) -> None:
    data = write_rows(tmp_path / "data")
    embeddings = {"tables": {"c2": {"table": "c4"}}}
    config = click(data, tmp_path / "run", embeddings=embeddings, model={"row_weights": row_weights})
    report = train(config, alone)
    assert report is not None and report["model"]["examples"] == 293
    assert list(table_weights(gr.load(tmp_path / "run").model)) == ["c1", "c3", "c4"]
    assert evaluate(config, Path(report["checkpoint"]), alone, "test")["model"] == report["model"]


@pytest.mark.slow
@pytest.mark.parametrize(("all_have", "own"), [("adagrad", "adam"), ("adam", "rowwise_adagrad"), ("sgd", "adagrad")])
@pytest.mark.parametrize("configure", [ranking, click])
def test_a_table_has_an_optimizer_of_its_own(
    tmp_path: Path, alone: World, configure: Callable, all_have: str, own: str
) -> None:
    """After one step each table is as in a run where every table has its optimizer: fused kernels or not."""
    data = write_rows(tmp_path / "data") if configure is click else write_users(tmp_path / "data")
    name = "c2" if configure is click else "category"

    def tables(run: str, **embeddings: object) -> dict[str, torch.Tensor]:
        config = configure(data, tmp_path / run, trainer={"steps": 1}, embeddings=embeddings)
        train(config, alone)
        return table_weights(gr.load(tmp_path / run).model)

    first = tables("first", optimizer={"kind": all_have, "lr": 0.1})
    second = tables("second", optimizer={"kind": own, "lr": 0.01})
    both = tables(
        "both", optimizer={"kind": all_have, "lr": 0.1}, tables={name: {"optimizer": {"kind": own, "lr": 0.01}}}
    )
    assert not torch.equal(first[name], second[name])
    for table, weight in both.items():
        assert torch.equal(weight, (second if table == name else first)[table]), table


@pytest.mark.slow
@pytest.mark.parametrize("configure", [ranking, click])
def test_a_table_has_a_dtype_of_its_own(tmp_path: Path, alone: World, configure: Callable) -> None:
    data = write_rows(tmp_path / "data") if configure is click else write_users(tmp_path / "data")
    name = "c2" if configure is click else "category"
    embeddings = {"tables": {name: {"dtype": "fp16", "optimizer": {"kind": "rowwise_adagrad"}}}}
    config = configure(data, tmp_path / "run", embeddings=embeddings)
    report = train(config, alone)
    assert report is not None
    saved = gr.load(tmp_path / "run")
    dtypes = {table: weight.dtype for table, weight in table_weights(saved.model).items()}
    assert dtypes.pop(name) == torch.float16 and set(dtypes.values()) == {torch.float32}
    assert evaluate(config, Path(report["checkpoint"]), alone, "test")["model"] == report["model"]


@pytest.mark.slow
def test_a_run_does_not_resume_with_other_features(tmp_path: Path, alone: World) -> None:
    data = write_twins(tmp_path / "data")
    train(ranking(data, tmp_path / "run", model={"features": ["category", "favourite"]}), alone)
    more = {"trainer": {"steps": 4}}
    with pytest.raises(
        CheckpointError, match=r'another model.*: model.features is \["category", "favourite"\] there, null'
    ):
        train(ranking(data, tmp_path / "run", **more), alone)
    features = {"features": ["category", "favourite"]}
    with pytest.raises(CheckpointError, match=r"table category is read by category there, by category, favourite now"):
        train(
            ranking(
                data,
                tmp_path / "run",
                model=features,
                embeddings={"tables": {"favourite": {"table": "category"}}},
                **more,
            ),
            alone,
        )


def test_an_unknown_feature_stops_a_run_before_it_starts(tmp_path: Path, alone: World) -> None:
    data = write_twins(tmp_path / "data")
    with pytest.raises(ConfigError, match="has no feature categry; did you mean 'category'"):
        train(ranking(data, tmp_path / "run", model={"features": ["categry"]}), alone)
    with pytest.raises(ConfigError, match=r"embeddings.tables: the model has no feature favourite"):
        train(
            ranking(data, tmp_path / "run", model={"features": ["category"]}, embeddings={"tables": {"favourite": {}}}),
            alone,
        )


def with_vocabularies(folder: Path, **values: list[str]) -> None:
    digests = {}
    for name, own in values.items():
        file = folder / vocabulary_file(name)
        file.parent.mkdir(exist_ok=True)
        ids = pa.array(range(1, len(own) + 1), pa.int64())
        pq.write_table(pa.table({"value": own, "id": ids, "count": pa.array([len(name)] * len(own))}), file)
        digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    DataSchema.load(folder).model_copy(update={"vocabularies": digests}).save(folder)


def test_a_shared_table_has_one_vocabulary(tmp_path: Path, alone: World) -> None:
    """The values count, not how often each column has them."""
    data = write_twins(tmp_path / "data")
    config = ranking(data, tmp_path / "run", embeddings={"tables": {"favourite": SHARED["favourite"]}})
    with_vocabularies(data, category=list("abcdef"), favourite=list("abcdef"))
    assert train(config, alone) is not None
    with_vocabularies(data, category=list("abcdef"), favourite=list("abcdeg"))
    with pytest.raises(
        DataError, match=r"favourite.table=category: .* stand for different values: unset it, or prepare"
    ):
        train(config, alone)


def test_evaluation_data_may_have_other_columns_that_are_not_read(tmp_path: Path, alone: World) -> None:
    data = write_rows(tmp_path / "data")
    less = without(data, tmp_path / "less", ["c3", "i2"])
    config = click(data, tmp_path / "run", evaluation={"path": str(less)}, model={"features": ["i1", "c1"]})
    report = train(config, alone)
    assert report is not None and report["model"]["examples"] == 293
    with pytest.raises(DataError, match="differ in dense"):
        train(click(data, tmp_path / "other", evaluation={"path": str(less)}), alone)
    assert TabularSchema.load(less).dense == ["i1", "i3"]
