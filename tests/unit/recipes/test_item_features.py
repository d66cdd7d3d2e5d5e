"""Retrieval with features of items: added to an item's vector, in histories and among the candidates."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import gr
from gr.config import RetrievalConfig
from gr.config.features import chosen_item_features
from gr.data.dataset import read_item_features
from gr.dist import World
from gr.embeddings import table_weights
from gr.errors import CheckpointError, ConfigError, DataError
from gr.experiment import evaluate, train
from gr.schema import DataSchema
from tests.support.tiny import ITEMS, group_of, tiny_config, write_groups

STEPS = 20


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_groups(tmp_path / "data")


def configured(data: Path, run_dir: Path, *features: str, steps: int = 4, **sections: object) -> RetrievalConfig:
    return tiny_config(
        data, run_dir, **{"model": {"features": list(features)}, "trainer": {"steps": steps}, **sections}
    )


def test_features_are_read_of_the_corpus(data: Path) -> None:
    schema = DataSchema.load(data)
    assert pq.read_schema(data / "items.parquet").names == ["item_id", "count", "group"]
    chosen = chosen_item_features(schema, ["group"])
    (name, ids_E), *none = read_item_features(data, chosen).items()
    assert (name, ids_E[0], none) == ("group", 0, []) and (ids_E[1:] == group_of(np.arange(1, ITEMS))).all()
    assert (
        chosen_item_features(schema, []).event_features == {}
        and read_item_features(data, chosen_item_features(schema, [])) == {}
    )
    with pytest.raises(
        DataError, match=r"model.features: .*items.parquet has no column hour; it has item_id, count, group"
    ):
        read_item_features(data, schema)
    with pytest.raises(ConfigError, match=r"has no feature country; it has: item_id, group, hour$"):
        chosen_item_features(schema, ["country"])
    low = schema.model_copy(update={"event_features": {"group": 3}})
    with pytest.raises(DataError, match=r"items.parquet: row 2, column group: is 3, allowed are 0 to 2"):
        read_item_features(data, low)


@pytest.mark.slow
def test_an_items_vector_is_the_sum_of_its_rows(data: Path, tmp_path: Path, alone: World) -> None:
    """Of histories and of candidates; equal in training, evaluation and a saved model."""
    config = configured(data, tmp_path / "run", "group")
    report = train(config, alone)
    assert report is not None
    assert evaluate(config, Path(report["checkpoint"]), alone, "test")["model"] == report["model"]
    saved = gr.load(tmp_path / "run")
    tables = {name: weight[:, :8] for name, weight in table_weights(saved.model).items()}
    assert list(tables) == ["item_id", "group"]
    ids_K = torch.tensor([1, 7, 60])
    expected_KD = tables["item_id"][ids_K] + tables["group"][torch.from_numpy(group_of(ids_K.numpy()))]
    assert torch.equal(saved.model.item_vectors(ids_K), expected_KD)
    assert tables["group"][0].eq(0).all() or not torch.equal(tables["group"][0], tables["group"][1])
    assert saved.recommend([[1, 6, 11]], k=3)[0][0].item in range(1, ITEMS)


@pytest.mark.slow
def test_it_learns_of_items_by_their_group(data: Path, tmp_path: Path, alone: World) -> None:
    """With few steps the five rows of groups tell more than the sixty of items."""
    settings = {"steps": STEPS, "evaluation": {"filter_seen": "none", "baselines": [], "global_batch_size": 16}}
    scores = {}
    for name, features in (("items", []), ("groups", ["group"])):
        report = train(configured(data, tmp_path / name, *features, **settings), alone)
        assert report is not None
        scores[name] = report["model"]["hr@10"]
    assert scores["groups"] > scores["items"] + 0.1, scores


@pytest.mark.slow
def test_without_features_nothing_changes(data: Path, tmp_path: Path, alone: World) -> None:
    """The features of the folder are neither read nor kept."""
    report = train(configured(data, tmp_path / "run"), alone)
    assert report is not None and list(table_weights(gr.load(tmp_path / "run").model)) == ["item_id"]
    with pytest.raises(CheckpointError, match=r'model.features is \[\] there, \["group"\] now'):
        train(configured(data, tmp_path / "run", "group", steps=5), alone)


def test_a_feature_of_events_is_refused_before_anything_is_written(data: Path, tmp_path: Path, alone: World) -> None:
    with pytest.raises(DataError, match="has no column hour"):
        train(configured(data, tmp_path / "run", "hour"), alone)
    assert "failed" in json.loads((tmp_path / "run/status.json").read_text())["state"]
