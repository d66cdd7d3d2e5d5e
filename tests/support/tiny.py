"""A data folder and a configuration small enough to train in a second."""

from pathlib import Path

import numpy as np

from gr.config.retrieval import RetrievalConfig
from gr.prepare.write import FolderWriter, Users
from gr.schema import HistoryColumns

ITEMS = 61
GROUPS = 6


def write_tiny(folder: Path, *, users: int = 96, seed: int = 0, timestamps: bool = False) -> Path:
    """Users who mostly walk from item i to i + 1, of 1 to 24 events; items 1..60."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 25, users)
    start = random.integers(1, ITEMS, users).repeat(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    age = np.arange(offsets[-1]) - offsets[:-1].repeat(lengths)
    walk = (start + age - 1) % (ITEMS - 1) + 1
    items = np.where(random.random(len(walk)) < 0.8, walk, random.integers(1, ITEMS, len(walk)))
    times = 1_000_000 + age * 60 if timestamps else None
    writer = FolderWriter(folder, HistoryColumns(timestamps=timestamps), item_cardinality=ITEMS)
    writer.write(Users(np.arange(users), offsets, items, times))
    writer.close(name="tiny", order="as generated", source="tests", corpus=np.arange(1, ITEMS))
    return folder


def group_of(items: np.ndarray) -> np.ndarray:
    """The feature `group` of items of write_groups, 1 to GROUPS - 1."""
    return (items - 1) % (GROUPS - 1) + 1


def write_groups(folder: Path, *, users: int = 128) -> Path:
    """Users who stay in one of five groups of items, from which theirs are drawn evenly; items 1..60.

    `group` is a feature of items, `hour` of events, `country` of users.
    """
    random = np.random.default_rng(0)
    lengths = random.integers(4, 25, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    group = random.integers(1, GROUPS, users).repeat(lengths)
    items = group + (GROUPS - 1) * random.integers(0, (ITEMS - 1) // (GROUPS - 1), offsets[-1])
    columns = HistoryColumns(event_features={"group": GROUPS, "hour": 24}, contextual={"country": 5})
    features = {"group": group_of(items), "hour": items % 24, "country": random.integers(0, 5, users)}
    writer = FolderWriter(folder, columns, item_cardinality=ITEMS)
    writer.write(Users(np.arange(users), offsets, items, None, None, features))
    corpus = np.arange(1, ITEMS)
    by_item = np.concatenate([[0], group_of(corpus)])
    writer.close(name="groups", order="as generated", source="tests", corpus=corpus, item_features={"group": by_item})
    return folder


def tiny_config(data: Path | str, run_dir: Path | str, /, **sections) -> RetrievalConfig:
    """A 2-layer HSTU of width 8 without dropout; `sections` replace or extend the sections of the configuration."""
    tree: dict = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "data": {"path": str(data), "max_length": 16, "lanes": 4},
        "model": {
            "dim": 8,
            "input_dropout": 0.0,
            "tower": {"kind": "hstu", "layers": 2, "heads": 2, "qk_dim": 4, "v_dim": 4, "dropout": 0.0},
        },
        "task": {"negatives": {"kind": "per_position", "count": 6}},
        "embeddings": {"optimizer": {"kind": "adam", "lr": 0.01}},
        "trainer": {"steps": 8, "global_batch_size": 16, "log_every": 1},
        "evaluation": {"global_batch_size": 16, "baselines": []},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return RetrievalConfig.model_validate(tree)
