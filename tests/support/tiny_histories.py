"""Histories with actions and every kind of feature, and a generative ranking small enough to train in seconds."""

from pathlib import Path

import numpy as np

from gr.config.ranking import RankingConfig
from gr.prepare.write import Users, write_folder
from gr.schema import DataSchema, HistoryColumns

ITEMS = 41
COLUMNS = HistoryColumns(
    timestamps=True,
    time_unit="ms",
    actions=["like", "share"],
    values=["watched"],
    event_features={"category": 43},
    contextual={"country": 45},
    contextual_numeric=["age"],
)
SCHEMA = DataSchema(
    format_version=1,
    name="tiny-histories",
    item_cardinality=ITEMS,
    order="as generated",
    users=1,
    events=0,
    items=ITEMS - 1,
    source="tests",
    **COLUMNS.model_dump(),
)


def write_histories(folder: Path, *, users: int = 96, longest: int = 24, seed: int = 0) -> DataSchema:
    """Users of 0 to `longest` events, who like 9 of 10 items or 1 of 10."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, longest + 1, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    events = int(offsets[-1])
    items = random.integers(1, ITEMS, events)
    taste = random.integers(0, 2, users).repeat(lengths)
    like = random.random(events) < 0.1 + 0.8 * taste
    share = like & (random.random(events) < 0.3)
    seconds = random.integers(1_000_000, 2_000_000, events)
    seconds = seconds[np.lexsort((seconds, np.arange(users).repeat(lengths)))]
    columns = {
        "actions": like.astype(np.int32) | share.astype(np.int32) << 1,
        "watched": (0.5 * like + 0.5 * random.random(events)).astype(np.float32),
        "category": items % 43,
        "country": random.integers(0, 45, users),
        "age": random.random(users).astype(np.float32),
    }
    return write_folder(
        folder,
        Users(np.arange(users) + 100, offsets, items, seconds * 1000 + 7, None, columns),
        corpus=np.arange(1, ITEMS),
        name="tiny-histories",
        order="as generated",
        source="tests",
        columns=COLUMNS,
    )


def write_twins(folder: Path, *, users: int = 48) -> Path:
    """Histories whose users have a favourite of the events' categories, and a last item."""
    random = np.random.default_rng(3)
    lengths = random.integers(3, 20, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = random.integers(1, 41, offsets[-1])
    columns = {
        "actions": random.integers(0, 4, len(items)).astype(np.int32),
        "watched": random.random(len(items)).astype(np.float32),
        "category": items % 7,
        "favourite": random.integers(0, 7, users),
        "last_item": random.integers(0, 41, users),
    }
    write_folder(
        folder,
        Users(np.arange(users) + 100, offsets, items, np.arange(len(items)) * 1000, None, columns),
        corpus=np.arange(1, 41),
        name="twins",
        order="as generated",
        source="tests",
        columns=HistoryColumns(
            timestamps=True,
            actions=["like", "share"],
            values=["watched"],
            event_features={"category": 7},
            contextual={"favourite": 7, "last_item": 41},
        ),
    )
    return folder


def tiny_ranking_config(
    data: Path | str = "data", run_dir: Path | str = "runs", /, **sections: object
) -> RankingConfig:
    """A 2-layer STU of width 8 without dropout; `sections` replace or extend the sections of the configuration."""
    tree: dict = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "data": {"path": str(data), "max_length": 16, "lanes": 4, "train_holdout": 4, "candidates": 3},
        "model": {
            "dim": 8,
            "input_dropout": 0.0,
            "time": {"buckets": 64},
            "tower": {"kind": "stu", "layers": 2, "heads": 2, "qk_dim": 4, "v_dim": 4, "dropout": 0.0},
            "head": [8],
        },
        "task": {
            "kind": "ranking",
            "tasks": [
                {"kind": "bce", "action": "like"},
                {"kind": "bce", "action": "share", "weight": 0.5},
                {"kind": "mse", "value": "watched", "weight": 2.0},
            ],
        },
        "embeddings": {"optimizer": {"kind": "adam", "lr": 0.01}},
        "trainer": {"steps": 8, "global_batch_size": 16, "log_every": 1},
        "evaluation": {"global_batch_size": 16, "newest": 2},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return RankingConfig.model_validate(tree)
