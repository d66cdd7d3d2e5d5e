"""A target of benchmarks.fuzz: the files of users, of items and of rows that a model is asked about."""

import math
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.fuzz import Trial, target
from benchmarks.fuzz_events import PLAIN, parquet_of, rows_of_a_log
from benchmarks.fuzz_runs import CONFIGS
from benchmarks.mutations import damaged
from gr.cli import main

USERS, ITEMS = [f"u{n}" for n in range(5)], list(range(1, 8))
SMALL = [
    "device=cpu",
    "trainer.steps=2",
    "trainer.global_batch_size=8",
    "trainer.log_every=1",
    "evaluation.every=2",
    "checkpoint.every=2",
]
MODELS = {
    "retrieval": (
        "retrieval/smoke",
        "histories",
        ["model.dim=8", "task.negatives.count=4", "evaluation.baselines=[]", "data.train_holdout=2", "data.lanes=4"],
    ),
    "ranking": (
        "ranking/movielens-hstu",
        "histories",
        [
            "model.dim=8",
            "task.tasks=[{kind: bce, action: l}]",
            "evaluation.newest=1",
            "data.train_holdout=2",
            "data.lanes=4",
        ],
    ),
    "click": ("dlrm/clicks", "rows", ["model.dim=8", "model.bottom=[8, 8]", "model.top=[8, 1]"]),
}


def models(folder: Path) -> Path:
    """A model of each kind, of one log, and what each says of undamaged files; made once."""
    place = folder.parent / "models"
    if not (place / "all.parquet").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        log = parquet_of(rows_of_a_log(60, True), place)
        for name, option in (("histories", "--action=l"), ("rows", "--label=l")):
            options = ["--source", str(log), "--out", str(place / name), *PLAIN, option]
            assert main(["prepare", "events", *options]) == 0
        for name, (config, data, overrides) in MODELS.items():
            paths = [f"run_dir={place / name}", f"data.path={place / data}", f"evaluation.path={place / data}"]
            assert main(["train", str(CONFIGS / f"{config}.yaml"), *paths, *SMALL, *overrides]) == 0
        pq.write_table(questions(), place / "questions.parquet")
        for name in ("ranking", "click"):
            assert predict(place, name, place / "questions.parquet", place / f"{name}.parquet") == 0
        assert main(["recommend", str(place / "retrieval"), "--k=7", f"--out={place / 'all.parquet'}"]) == 0
    return place


def predict(place: Path, name: str, file: Path, out: Path) -> int:
    size = "evaluation.global_batch_size=8"
    return main(["predict", str(place / name), f"--input={file}", f"--out={out}", size])


def questions() -> pa.Table:
    """Each user with each item, in the columns that a ranking and a click model read."""
    count = len(USERS) * len(ITEMS)
    user, item = [user for user in USERS for _ in ITEMS], ITEMS * len(USERS)
    x, category = np.arange(count) / 4, [f"c{n % 3}" for n in range(count)]
    times = np.arange(count) + 1_800_000_000
    columns = {"user_id": user, "item_id": item, "timestamp": times, "f": category, "u": user, "i": item, "x": x}
    return pa.table(columns)


def odd_column(random: np.random.Generator, table: pa.Table) -> tuple[pa.Table, str]:
    """A table of which one column is of another type, or has other values."""
    place = int(random.integers(table.num_columns))
    name, column = table.column_names[place], table.column(place).combine_chunks()
    values, row = column.to_pylist(), int(random.integers(max(len(column), 1)))
    others = (None, -1, 0, 2**63 - 1, 10**15, 1.5, math.nan, math.inf, 1e300, "", "new", "a\nb", "u0", "7", True, b"7")
    other = others[int(random.integers(len(others)))]
    kinds: dict[str, Callable[[], Any]] = {
        "text": lambda: pa.array(list(map(str, values))),
        "another value": lambda: pa.array([*values[:row], other, *values[row + 1 :]]),
        "another value everywhere": lambda: pa.array([other] * len(values)),
        "nothing but nulls": lambda: pa.nulls(len(values)),
        "categories": lambda: column.dictionary_encode(),
        "float64": lambda: column.cast(pa.float64()),
        "decimals": lambda: column.cast(pa.decimal128(38, 2)),
        "uint64": lambda: column.cast(pa.uint64()),
        "long text": lambda: column.cast(pa.large_string()),
        "bytes": lambda: pa.array([str(value).encode() for value in values]),
        "lists": lambda: pa.array([[value] for value in values]),
        "structs": lambda: pa.array([{"a": value} for value in values], pa.struct({"a": column.type})),
        "seconds": lambda: column.cast(pa.timestamp("s")),
        "dates of another zone": lambda: column.cast(pa.timestamp("us", "Asia/Tokyo")),
        "days": lambda: column.cast(pa.int32()).cast(pa.date32()),
    }
    kind = str(random.choice([*kinds, "gone", "twice", "of another name", "without rows", "rows twice"]))
    match kind:
        case "gone":
            return table.remove_column(place), f"{name} gone"
        case "twice":
            return table.append_column(name, column), f"{name} twice"
        case "of another name":
            return table.rename_columns([*table.column_names[:place], "a\nb", *table.column_names[place + 1 :]]), kind
        case "without rows":
            return table.slice(0, 0), kind
        case "rows twice":
            return pa.concat_tables([table, table]), kind
    try:
        return table.set_column(place, name, kinds[kind]()), f"{name}: {kind}, {other!r} in row {row}"
    except (pa.ArrowException, TypeError, OverflowError):  # no such values
        return table, "nothing"


def as_text(value: Any) -> str:
    """The id that a value stands for."""
    is_whole = isinstance(value, int | float | Decimal) and math.isfinite(value) and value == int(value)
    return str(int(value) if is_whole else value)


def recommended(everything: pa.Table, users: set[str] | None, items: set[str] | None, limits: dict[str, int]) -> list:
    """The rows for these users and items, of those of all users and items."""
    places: dict[str, int] = {}
    rows = []
    for row in sorted(everything.to_pylist(), key=lambda row: (row["user_id"], row["place"])):
        user, item = row["user_id"], row["item_id"]
        if (users is None or user in users) and (items is None or str(item) in items):
            places[user] = places.get(user, 0) + 1
            if places[user] <= limits.get(user, 2):
                rows.append((user, item, places[user]))
    return rows


def recommend_trial(random: np.random.Generator, folder: Path, place: Path) -> Trial:
    about = str(random.choice(["users", "items"]))
    table = pa.table({"user_id": USERS[:3], "k": [1, 3, 2]}) if about == "users" else pa.table({"item_id": ITEMS[2:]})
    file, out = folder / f"{about}.parquet", folder / "out.parquet"
    mutation = write(random, table, file)

    def run() -> int:
        return main(["recommend", str(place / "retrieval"), "--k=2", f"--{about}={file}", f"--out={out}"])

    def difference() -> str | None:
        read = pq.ParquetFile(file).read()
        named = {as_text(value) for value in read.column(0 if about == "items" else "user_id").to_pylist()}
        limits = {}
        if about == "users" and "k" in read.column_names:
            limits = dict(zip(read.column("user_id").to_pylist(), map(int, read.column("k").to_pylist()), strict=True))
        chosen = (named, None) if about == "users" else (None, named)
        wanted = recommended(pq.read_table(place / "all.parquet"), *chosen, limits)
        actual = [(row["user_id"], row["item_id"], row["place"]) for row in pq.read_table(out).to_pylist()]
        return None if sorted(actual) == sorted(wanted) else f"wanted {wanted}, wrote {actual}"[:500]

    return Trial(f"recommend --{about}, {mutation}", run, difference)


def predict_trial(random: np.random.Generator, folder: Path, place: Path) -> Trial:
    name = str(random.choice(["ranking", "click"]))
    file, out = folder / "rows.parquet", folder / "out.parquet"
    mutation = write(random, questions(), file)
    read = ["user_id", "item_id", "timestamp", "f"] if name == "ranking" else ["u", "i", "x", "f"]

    def scores(table: pa.Table) -> list[tuple[str, Any]]:
        score = table.column(table.num_columns - 1).to_pylist()
        columns = [table.column(column).to_pylist() for column in read if column in table.column_names]
        return list(zip(map(str, zip(*columns, strict=True)), score, strict=True))

    def difference() -> str | None:
        given, table = (pq.ParquetFile(each).read() for each in (file, out))
        # As text, in which NaN is NaN.
        if str(table.remove_column(table.num_columns - 1).to_pydict()) != str(given.to_pydict()):
            return "the columns are not those of the input"
        whole = dict(scores(pq.read_table(place / f"{name}.parquet")))
        for row, (key, score) in enumerate(scores(table)):
            if key in whole and (score is None or abs(score - whole[key]) > 1e-5):
                return f"row {row}, {key}: was {whole[key]}, is {score}"
        return None

    return Trial(f"predict, {name}, {mutation}", lambda: predict(place, name, file, out), difference)


def write(random: np.random.Generator, table: pa.Table, file: Path) -> str:
    """Writes an odd table, or damages the file of a good one; returns what was done."""
    whole = random.random() < 0.6
    table, mutation = odd_column(random, table) if whole else (table, "")
    pq.write_table(table, file, row_group_size=int(random.integers(1, 40)), write_page_checksum=True)
    if not whole:
        content, mutation = damaged(random, file.read_bytes())
        file.write_bytes(content)
    return mutation


@target("answers inputs")
def answers(random: np.random.Generator, folder: Path) -> Trial:
    trial = recommend_trial if random.random() < 0.5 else predict_trial
    return trial(random, folder, models(folder))
