"""Targets of benchmarks.fuzz: data folders as `gr prepare` wrote them, damaged since."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.fuzz import Trial, target
from benchmarks.fuzz_raw import kuairand_files
from benchmarks.mutations import changed, damaged
from gr.cli import main
from gr.data.dataset import Dataset
from gr.data.tabular import TabularDataset
from gr.schema import SCHEMA_FILE

VALUES = (
    None,
    True,
    -1,
    0,
    1,
    2,
    10**6,
    2**31,
    2**63,
    10**30,
    1.5,
    float("nan"),
    "",
    "x",
    "7",
    [],
    {},
    [None],
    {"a": -1},
)


def histories_folder(folder: Path) -> Path:
    """A folder of histories with every kind of column, made once."""
    whole = folder.parent / "whole"
    if not whole.exists():
        raw = folder.parent / "raw"
        raw.mkdir(exist_ok=True)
        for name, text in kuairand_files(np.random.default_rng(0), 100).items():
            (raw / name).write_bytes(text)
        assert main(["prepare", "kuairand-1k", "--source", str(raw), "--out", str(whole)]) == 0
    return whole


def tabular_folder(folder: Path) -> Path:
    whole = folder.parent / "whole"
    if not whole.exists():
        made = folder.parent / "made"
        assert main(["prepare", "clicks", "--rows", "500", "--test-rows", "50", "--out", str(made), "--force"]) == 0
        (made / "train").rename(whole)
    return whole


def history_content(folder: Path) -> dict[str, object]:
    """All that a folder of histories holds, as training reads it, by name."""
    dataset = Dataset.open(folder)
    schema = dataset.schema
    content = {"users": schema.users, "items": schema.items, "corpus": dataset.corpus()}
    for index in range(len(dataset.row_groups)):
        group = dataset.read_row_group(index, ["user_id", *schema.event_columns, *schema.user_columns])
        content |= {f"{name}, {index}": column for name, column in {**group.columns, "offsets": group.offsets}.items()}
    return content


def tabular_content(folder: Path) -> dict[str, object]:
    dataset = TabularDataset.open(folder)
    content: dict[str, object] = {"rows": dataset.schema.rows}
    names = [column.name for column in dataset.schema.sparse for _ in range(column.hots)]
    for index in range(len(dataset.row_groups)):
        group = dataset.read_row_group(index)
        columns = {"label": group.labels_B, **dict(zip(dataset.schema.dense, group.dense_BN.T, strict=True))}
        columns |= dict(zip(names, group.ids_BH.T, strict=True))
        content |= {f"{name}, {index}": column for name, column in columns.items()}
    return content


def reading(
    folder: Path, whole: Path, read: Callable[[Path], dict], may_lack: bool
) -> tuple[Callable[[], None], Callable[[], str | None]]:
    """(run, difference) of a Trial that reads a folder. may_lack: whether it may hold less than the whole one."""
    contents = []

    def run() -> None:
        contents.append(read(folder))

    def difference() -> str | None:
        before, (after,) = read(whole), contents
        if lacks := before.keys() - after.keys() - (before.keys() if may_lack else set()):
            return f"has no {min(lacks)}"
        wrong = [name for name in after if name not in before or not same(before[name], after[name])]
        return f"{wrong[0]} was {str(before.get(wrong[0]))[:99]}, is {str(after[wrong[0]])[:99]}" if wrong else None

    return run, difference


def same(before: object, after: object) -> bool:
    if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
        return all(same(*pair) for pair in zip(before, after, strict=True))
    if isinstance(before, np.ndarray) and isinstance(after, np.ndarray):
        return before.dtype == after.dtype and before.shape == after.shape and before.tobytes() == after.tobytes()
    return bool(before == after)


def bits(random: np.random.Generator, folder: Path, whole: Path, read: Callable[[Path], dict]) -> Trial:
    copy = folder / "data"
    shutil.copytree(whole, copy)
    file = str(random.choice(sorted(path.name for path in copy.glob("*.parquet"))))
    content, mutation = damaged(random, (copy / file).read_bytes())
    (copy / file).write_bytes(content)
    return Trial(f"{file}, {mutation}", *reading(copy, whole, read, may_lack=False))


@target("history parquet")
def history_parquet(random: np.random.Generator, folder: Path) -> Trial:
    return bits(random, folder, histories_folder(folder), history_content)


@target("tabular parquet")
def tabular_parquet(random: np.random.Generator, folder: Path) -> Trial:
    return bits(random, folder, tabular_folder(folder), tabular_content)


def other_json(random: np.random.Generator, text: bytes) -> tuple[bytes, str]:
    """JSON text in which one value is another, or is gone; or text that is damaged."""
    if random.random() < 0.3:
        return changed(random, text, b":")
    tree = json.loads(text)
    node, path = tree, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[int(random.integers(len(keys)))]
        path.append(key)
        if isinstance(node[key], dict | list) and node[key] and random.random() < 0.7:
            node = node[key]
            continue
        break
    if random.random() < 0.15:
        del node[key]
        return json.dumps(tree).encode(), f"{path} gone"
    value = VALUES[int(random.integers(len(VALUES)))]
    node[key] = value
    return json.dumps(tree).encode(), f"{path} is {value!r}"


def schema(random: np.random.Generator, folder: Path, whole: Path, read: Callable[[Path], dict]) -> Trial:
    copy = folder / "data"
    shutil.copytree(whole, copy)
    content, mutation = other_json(random, (whole / SCHEMA_FILE).read_bytes())
    (copy / SCHEMA_FILE).write_bytes(content)
    return Trial(mutation, *reading(copy, whole, read, may_lack=True))


@target("history schema")
def history_schema(random: np.random.Generator, folder: Path) -> Trial:
    return schema(random, folder, histories_folder(folder), history_content)


@target("tabular schema")
def tabular_schema(random: np.random.Generator, folder: Path) -> Trial:
    return schema(random, folder, tabular_folder(folder), tabular_content)
