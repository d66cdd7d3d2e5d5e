"""`sizes: data`: what is unset follows from schema.json, what is written stays, and each value has its reason."""

from pathlib import Path

import pytest

from gr.config import dump_config, load_config
from gr.config.sizing import SIZED, retrieval_sizes
from gr.errors import ConfigError
from gr.schema import DataSchema
from tests.support.schemas import item_schema


def _data(folder: Path, **sizes: int) -> DataSchema:
    schema = item_schema(31).model_copy(update={"order": "index", **sizes})
    (folder / "schema.json").write_text(schema.model_dump_json())
    return schema


@pytest.mark.parametrize("users, events, items", [(1, 2, 1), (943, 100_000, 1_682), (2_000_000, 90_000_000, 400_000)])
def test_every_size_is_accepted_and_explained(tmp_path, users, events, items):
    schema = _data(tmp_path, users=users, events=events, items=items, item_cardinality=items + 1)
    assert tuple(retrieval_sizes(schema)) == SIZED
    config = load_config("retrieval/hstu", [f"data.path={tmp_path}"])
    reasons = config.reasons(schema)
    assert [line.split("=")[0] for line in reasons] == list(SIZED)
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_config(config))
    assert load_config(saved) == config, "all is set in it, so the data are not asked again"


@pytest.mark.parametrize(
    "users, events, expected",
    [
        (22_363, 198_502, {"task.temperature": 0.1, "data.event_dropout": 0.2, "trainer.epochs": 75}),  # Beauty
        (1_090, 52_551, {"task.temperature": 0.1, "data.event_dropout": 0.2, "trainer.epochs": 142}),  # LastFM
        (943, 100_000, {"task.temperature": 0.1, "data.event_dropout": 0.2, "trainer.epochs": 85}),  # MovieLens-100K
        (6_040, 999_611, {"task.temperature": 0.05, "data.event_dropout": 0.0, "trainer.epochs": 50}),  # MovieLens-1M
    ],
)
def test_sizes_of_public_data(tmp_path, users, events, expected):
    """docs/benchmarks has how good they are there."""
    sizes = retrieval_sizes(_data(tmp_path, users=users, events=events, items=3_646, item_cardinality=3_647))
    assert {key: sizes[key].value for key in expected} == expected


def test_what_is_written_stays_and_has_no_reason(tmp_path):
    schema = _data(tmp_path, users=943, events=100_000, items=1_682)
    config = load_config("retrieval/hstu", [f"data.path={tmp_path}", "model.dim=17", "trainer.steps=3"])
    assert config.model.dim == 17 and config.trainer.epochs is None
    explained = {line.split("=")[0] for line in config.reasons(schema)}
    assert set(SIZED) - explained == {"model.dim", "trainer.epochs"}


def test_a_tower_without_the_key_of_a_size(tmp_path):
    schema = _data(tmp_path, users=943, events=100_000, items=1_682)
    config = load_config("retrieval/hstu", [f"data.path={tmp_path}", "model.tower.kind=sasrec"])
    explained = {line.split("=")[0] for line in config.reasons(schema)}
    assert set(SIZED) - explained == {"model.tower.time_bias"}


@pytest.mark.parametrize(
    "override", ["=x", "data", "data..path=x", "data.path='open", "data.path=a\nb: c", "data.path=*x"]
)
def test_an_override_that_cannot_be_read_is_named_before_the_data(override):
    with pytest.raises(ConfigError) as error:
        load_config("retrieval/hstu", [override])
    assert "override '" in str(error.value) and "no such folder" not in str(error.value)
