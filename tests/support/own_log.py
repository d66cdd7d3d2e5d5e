"""A small log of one's own, prepared and read back in its own ids."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gr.api import prepare_events
from gr.data.vocabulary import Vocabulary
from gr.errors import DataError
from gr.schema import DataSchema
from tests.support.history_folder import histories_by_user

LOG = pd.DataFrame(
    {
        "u": ["a", "b", "b", "a", "c"],
        "i": ["x2", "x1", "x3", "x1", "x2"],
        "t": [1_700_000_100, 1_700_000_050, 1_700_000_060, 1_700_000_000, 1_700_000_070],
        "x": [0.5, 1.0, 2.0, 3.0, 4.0],
        "f": ["p", "q", None, "p", "q"],
        "l": [0, 1, 0, 1, 1],
    }
)
TIMED: dict[str, Any] = {"user": "u", "item": "i", "time": "t", "time_unit": "s"}


def random_log(events: int = 500, *, users: int = 57, items: int = 43, seed: int = 0) -> pd.DataFrame:
    """Users and items that are text, times that differ, a column of every kind; each user has two events or more."""
    random = np.random.default_rng(seed)
    user, item = random.integers(0, users, events), random.integers(0, items, events)
    user[: 2 * users] = np.tile(np.arange(users), 2)
    like = random.random(events) < 0.2 + 0.6 * (user % 2)
    return pd.DataFrame(
        {
            "user": [f"user {each:02}" for each in user],
            "item": [f"item {each:02}" for each in item],
            "when": 1_700_000_000 + random.permutation(events) * 60,
            "like": like.astype(int),
            "share": (like & (random.random(events) < 0.4)).astype(int),
            "watched": random.random(events).round(3),
            "shop": [f"shop {each}" for each in random.integers(0, 5, events)],
        }
    )


def prepared(out: Path, source: Any, **options: Any) -> Path:
    prepare_events(source, out, **options)
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".") and path.name != ".hidden.csv"]
    return out


def decoded(folder: Path) -> dict[Any, dict[str, Any]]:
    """The columns of each user, by the user's own id, with the items' and categories' own ids; None for none."""
    schema = DataSchema.load(folder)
    users = Vocabulary.open(folder, schema, "user_id")
    histories = histories_by_user(folder)
    names = users.values(list(histories)).to_pylist()
    return {name: _own(folder, schema, columns) for name, columns in zip(names, histories.values(), strict=True)}


def _own(folder: Path, schema: DataSchema, columns: dict[str, Any]) -> dict[str, Any]:
    own = {}
    for name, ids in columns.items():
        entry = "item_id" if name == "item_ids" else name
        if entry in schema.vocabularies:
            values = Vocabulary.open(folder, schema, entry).values(ids if isinstance(ids, list) else [ids]).to_pylist()
            own[name] = values if isinstance(ids, list) else values[0]
        else:
            own[name] = ids
    return own


def refusal(folder: Path, source: Any, **options: Any) -> str:
    """The one line that is said, with nothing left behind."""
    before = sorted(folder.iterdir())
    with pytest.raises(DataError) as error:
        prepare_events(source, folder / "refused", **options)
    assert sorted(folder.iterdir()) == before
    assert "\n" not in str(error.value)
    return str(error.value)
