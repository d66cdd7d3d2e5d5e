"""Histories with ratings, and a preference run small enough to train in a second."""

from pathlib import Path

import numpy as np

from gr.config.preference import PreferenceConfig
from gr.prepare.write import FolderWriter, Users
from gr.schema import HistoryColumns
from tests.support.tiny import ITEMS, tiny_config


def write_rated(folder: Path, *, users: int = 96) -> Path:
    """Users of 1 to 24 events, who rate items up to 30 with 4 or 5 and others with 1 or 2, mostly; items 1..60."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 25, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = random.integers(1, ITEMS, offsets[-1])
    good = (items <= 30) ^ (random.random(len(items)) < 0.1)
    ratings = (np.where(good, 4, 1) + random.integers(0, 2, len(items))).astype(np.float32)
    columns = {"actions": (ratings >= 2).astype(np.int32) | (ratings >= 4).astype(np.int32) << 1}
    named = HistoryColumns(timestamps=True, ratings=True, actions=["finish", "like"])
    writer = FolderWriter(folder, named, item_cardinality=ITEMS)
    writer.write(Users(np.arange(users), offsets, items, 1_000_000 + np.arange(len(items)), ratings, columns))
    writer.close(name="rated", order="as generated", source="tests", corpus=np.arange(1, ITEMS))
    return folder


def tiny_preference(data: Path, run_dir: Path, load_from: Path, /, **sections) -> PreferenceConfig:
    """S-DPO on the model of tiny_config, from the run `load_from`."""
    tree = tiny_config(data, run_dir).model_dump()
    tree["task"] = {"kind": "preference", "window": 6, "rejected": 2, "drawn": 3}
    tree["evaluation"]["select_by"] = "liked_hr@10"
    tree["checkpoint"]["load_from"] = str(load_from)
    for name, section in sections.items():
        tree[name] = {**tree[name], **section} if isinstance(section, dict) else section
    return PreferenceConfig.model_validate(tree)
