"""Evaluation data without anything to evaluate is one line before the training, not a failure after it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.dist import World
from gr.errors import DataError
from gr.recipes.base import open_recipe
from gr.recipes.baselines import Targets, evaluate_baselines
from tests.support.tiny import tiny_config, write_tiny
from tests.support.tiny_histories import tiny_ranking_config, write_histories


def cut(folder: Path, events: int) -> Path:
    """The folder with no more than the oldest `events` events of each user."""
    total = 0
    for part in folder.glob("part-*"):
        table = pq.read_table(part)
        for place, field in enumerate(table.schema):
            if pa.types.is_list(field.type):
                rows = [row[:events] for row in table[field.name].to_pylist()]
                table = table.set_column(place, field, pa.array(rows, field.type))
        total += sum(map(len, table["item_ids"].to_pylist()))
        pq.write_table(table, part)
    schema = folder / "schema.json"
    schema.write_text(json.dumps(json.loads(schema.read_text()) | {"events": total}))
    return folder


@pytest.mark.parametrize(("every", "events"), [(None, 1), (None, 0), (4, 2)])
def test_retrieval(tmp_path: Path, alone: World, every: int | None, events: int) -> None:
    data, other = write_tiny(tmp_path / "data"), cut(write_tiny(tmp_path / "other"), events)
    evaluation = {"path": str(other), "every": every}
    recipe = open_recipe(tiny_config(data, tmp_path / "run", evaluation=evaluation))
    with pytest.raises(DataError, match="other: no user has an event before the held-out one"):
        recipe.loader(alone)
    cut(write_tiny(other.with_name("more")), events + 1).rename(tmp_path / "enough")
    enough = {"path": str(tmp_path / "enough"), "every": every}
    if events:
        open_recipe(tiny_config(data, tmp_path / "run", evaluation=enough)).loader(alone).close()


def test_baselines(tmp_path: Path) -> None:
    from gr.data.dataset import Dataset

    data, other = write_tiny(tmp_path / "data"), cut(write_tiny(tmp_path / "other"), 1)
    with pytest.raises(DataError, match="other: no user has an event before the held-out one"):
        targets = Targets(Dataset.open(other), 1, "all", max_length=8)
        evaluate_baselines(Dataset.open(data), targets, names=["popularity"], train_holdout=0)


def test_ranking(tmp_path: Path, alone: World) -> None:
    for name in ("data", "other"):
        (tmp_path / name).mkdir()
        write_histories(tmp_path / name)
    cut(tmp_path / "other", 0)
    recipe = open_recipe(
        tiny_ranking_config(tmp_path / "data", tmp_path / "run", evaluation={"path": str(tmp_path / "other")})
    )
    with pytest.raises(DataError, match=r"other: no user has 1 events, .* \(test split\)"):
        recipe.loader(alone)
