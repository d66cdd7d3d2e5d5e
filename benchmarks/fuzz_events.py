"""Targets of benchmarks.fuzz: logs of `gr prepare events`, and the vocabularies that it writes.

What is written is compared with what a second reader finds in the same damaged log: the csv and json of Python, and
pyarrow.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.fuzz import Trial, target
from benchmarks.fuzz_folders import history_content, tabular_content
from benchmarks.fuzz_raw import Wrong
from benchmarks.mutations import changed, damaged
from gr.cli import main
from gr.data.vocabulary import Vocabulary
from gr.errors import GRError
from gr.schema import DataSchema, vocabulary_file

TIME = 1_700_000_000
NAMES = ["u", "i", "t", "x", "f", "l"]
PLAIN = ["--user=u", "--item=i", "--time=t", "--time-unit=s", "--value=x", "--feature=f", "--keep-duplicates"]
WHOLE = re.compile(r"-?[0-9]{1,19}(\.[0-9]*)?")
# Options beside those of the user and the item, of which a few are chosen.
MORE = (
    *(
        "--time=t",
        "--time-unit=s",
        "--time-unit=ns",
        "--rating=x",
        "--value=x",
        "--value=t",
        "--action=l",
        "--action=f",
    ),
    *("--feature=f", "--feature=i", "--label=l", "--label=x", "--min-user-events=2", "--min-item-events=3"),
    *("--since=2023-11-14", "--until=2023-11-14T22:14", "--since=x", "--keep-duplicates", "--on-bad-row=skip"),
    *("--test-from=2023-11-14T22:14", "--test-users=0.5", "--memory=0.1", "--value=none", "--feature=\n"),
)


def rows_of_a_log(count: int, text: bool) -> list[list[Any]]:
    """Of users, items, times, numbers, categories and labels; a number in eleven and a category in five is missing."""
    user = "u{}" if text else "{}"
    return [
        [user.format(n * 7 % 5), 1 + n * 3 % 7, TIME + n * 37 % 500, n / 4, f"c{n % 3}" if n % 5 else None, n % 2]
        for n in range(count)
    ]


def parquet_of(rows: list[list[Any]], folder: Path) -> Path:
    """As pandas writes it: no checksums of pages."""
    path = folder / "log.parquet"
    pq.write_table(pa.table([pa.array(column) for column in zip(*rows, strict=True)], names=NAMES), path)
    return path


def text_of(rows: list[list[Any]], kind: str) -> bytes:
    if kind == "jsonl":
        return "".join(json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in rows).encode()
    text = io.StringIO()
    csv.writer(text, delimiter="\t" if kind == "tsv" else ",", lineterminator="\n").writerows([NAMES, *rows])
    return text.getvalue().encode()


def read_again(path: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of a log, by Python's own readers. Raises Wrong."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if kind == "parquet":
            return pq.read_table(path, columns=NAMES[:5]).to_pylist()
        text = content.decode("utf-8-sig")
        if kind == "jsonl":
            return [json.loads(line, parse_int=str, parse_float=str) for line in text.split("\n") if line.strip()]
        names, *rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if kind == "tsv" else ",", strict=True)
        if wrong := [row for row in rows if row and len(row) != len(names)]:
            raise Wrong(f"{len(wrong[0])} fields in {wrong[0]}")
        return [{name: value or None for name, value in zip(names, row, strict=True)} for row in rows if row]
    except (OSError, EOFError, ValueError, csv.Error, pa.ArrowException) as error:
        raise Wrong(f"{type(error).__name__}: {error}") from None


def events_of(rows: Iterable[dict[str, Any]]) -> dict[str, list]:
    """By user: item, milliseconds, number and category of events in order of time."""
    events = []
    for row in rows:
        try:
            user, item, time, value, category = (row.get(name) for name in NAMES[:5])
            if user is None or item is None or not WHOLE.fullmatch(str(time)):
                raise Wrong(f"{row} lacks a user, an item or a time")
            if not np.isfinite(number := float(np.float32(float(value)))):
                raise Wrong(f"{value} is not finite")
        except (AttributeError, TypeError, ValueError) as error:
            raise Wrong(f"{row}: {error}") from None
        shown = [str(item), round(float(time) * 1000), number, None if category is None else str(category)]
        events.append((str(user), shown))
    users: dict[str, list] = {}
    for user, event in sorted(events, key=lambda each: each[1][1]):
        users.setdefault(user, []).append(event)
    return users


def written(folder: Path) -> dict[str, list]:
    """The same of a data folder, in the log's own ids."""
    schema = DataSchema.load(folder)
    own = {name: Vocabulary.open(folder, schema, name) for name in ("user_id", "item_id", "f")}
    scale = 1 if schema.time_unit == "ms" else 1000
    users = {}
    for table in map(pq.read_table, sorted(folder.glob("part-*.parquet"))):
        for row in table.to_pylist():
            (user,) = own["user_id"].values(np.array([row["user_id"]])).to_pylist()
            items = own["item_id"].values(np.array(row["item_ids"])).to_pylist()
            categories = own["f"].values(np.array(row["f"])).to_pylist()
            texts = (None if category is None else str(category) for category in categories)
            times = (time * scale for time in row["timestamps"])
            users[str(user)] = [list(event) for event in zip(map(str, items), times, row["x"], texts, strict=True)]
    return users


def readable(out: Path) -> str | None:
    """What is wrong with the folders that were written, which training must be able to read."""
    folders = [schema.parent for schema in out.rglob("schema.json")]
    try:
        for folder in folders:
            is_tabular = '"kind": "tabular"' in (folder / "schema.json").read_text()
            (tabular_content if is_tabular else history_content)(folder)
    except GRError as error:
        return f"wrote what cannot be read: {error}"
    return None if folders else "wrote nothing"


@target("events log")
def events_log(random: np.random.Generator, folder: Path) -> Trial:
    """A damaged log, with the options of which all values are compared, or with odd ones."""
    kind = str(random.choice(["parquet", "csv", "tsv", "jsonl"]))
    rows = rows_of_a_log(40, bool(random.random() < 0.5))
    if kind == "parquet":
        path = parquet_of(rows, folder)
        content, mutation = damaged(random, path.read_bytes())
    else:
        packed = random.random() < 0.15
        path = folder / f"log.{kind}{'.gz' * packed}"
        separator = {"csv": b",", "tsv": b"\t", "jsonl": b", "}[kind]
        text = text_of(rows, kind)
        content, mutation = damaged(random, gzip.compress(text)) if packed else changed(random, text, separator)
    path.write_bytes(content)
    out = folder / "out"
    plain = random.random() < 0.6
    options = PLAIN if plain else ["--user=u", "--item=i", *map(str, random.choice(MORE, int(random.integers(1, 5))))]

    def difference() -> str | None:
        if not plain:
            return readable(out)
        found = written(out)
        if kind == "parquet" and found == events_of(dict(zip(NAMES, row, strict=True)) for row in rows):
            return None
        try:
            wanted = events_of(read_again(path, kind))
        except Wrong as error:
            return f"accepted, though {error}"[:500]
        if found == wanted:
            return None
        return next(
            f"{user}: wanted {str(wanted.get(user))[:200]}, wrote {str(found.get(user))[:200]}"
            for user in wanted | found
            if wanted.get(user) != found.get(user)
        )

    run = lambda: main(["prepare", "events", "--source", str(path), "--out", str(out), *options])  # noqa: E731
    return Trial(f"{path.name}, {mutation}, {' '.join(options)}", run, difference)


def odd_vocabulary(random: np.random.Generator, table: pa.Table) -> tuple[pa.Table, str]:
    """A vocabulary that gr did not write."""
    values, ids, counts = (table.column(name).to_pylist() for name in ("value", "id", "count"))
    kinds: dict[str, Callable[[], pa.Table]] = {
        "without values": lambda: table.drop("value"),
        "without ids": lambda: table.drop("id"),
        "values that are floats": lambda: table.set_column(0, "value", pa.array(np.arange(len(ids)) / 2)),
        "values that are null": lambda: table.set_column(
            0, "value", pa.array([None, *values[1:]], table.schema.field(0).type)
        ),
        "values in another order": lambda: table.set_column(0, "value", pa.array(values[::-1])),
        "a value twice": lambda: table.set_column(0, "value", pa.array([values[1], *values[1:]])),
        "ids in another order": lambda: table.set_column(1, "id", pa.array(ids[::-1])),
        "an id below 0": lambda: table.set_column(1, "id", pa.array([-5, *ids[1:]])),
        "an id that is 0": lambda: table.set_column(1, "id", pa.array([0, *ids[1:]])),
        "an id that is large": lambda: table.set_column(1, "id", pa.array([*ids[:-1], 1 << 62])),
        "an id that is null": lambda: table.set_column(1, "id", pa.array([None, *ids[1:]])),
        "ids that are text": lambda: table.set_column(1, "id", pa.array(list(map(str, ids)))),
        "no rows": lambda: table.slice(0, 0),
        "two columns of one name": lambda: pa.table([values, values, ids, counts], names=["value", "value", "id", "c"]),
    }
    name = str(random.choice(list(kinds)))
    return kinds[name](), name


def own_folder(folder: Path) -> tuple[Path, Path]:
    """A folder of a log with text, and that log; made once."""
    whole, log = folder.parent / "whole", folder.parent / "log.parquet"
    if not whole.exists():
        parquet_of(rows_of_a_log(60, True), folder.parent)
        assert main(["prepare", "events", "--source", str(log), "--out", str(whole), *PLAIN]) == 0
    return whole, log


@target("vocabulary files")
def vocabularies(random: np.random.Generator, folder: Path) -> Trial:
    """A vocabulary that is damaged; or another one, whose sum schema.json has: an error, or ids of the same values."""
    whole, log = own_folder(folder)
    copy, out = folder / "data", folder / "out"
    shutil.copytree(whole, copy)
    name = str(random.choice(["item_id", "user_id", "f"]))
    path = copy / vocabulary_file(name)
    if signed := random.random() < 0.5:
        table, mutation = odd_vocabulary(random, pq.read_table(path))
        pq.write_table(table, path)
        content = path.read_bytes()
        schema = json.loads((copy / "schema.json").read_text())
        schema["vocabularies"][name] = hashlib.sha256(content).hexdigest()
        (copy / "schema.json").write_text(json.dumps(schema))
    else:
        content, mutation = damaged(random, path.read_bytes())
        path.write_bytes(content)
    prepares = random.random() < 0.5
    found: dict[str, list] = {}

    def run() -> int | None:
        if prepares:
            given = ["--vocabulary", str(copy), *PLAIN]
            return main(["prepare", "events", "--source", str(log), "--out", str(out), *given])
        found.update(written(copy))
        return None

    def difference() -> str | None:
        if mutation == "no rows" or (name, mutation) == ("user_id", "an id that is large"):  # some are not known then
            return readable(out if prepares else copy)
        before, after = written(whole), written(out) if prepares else found
        return None if before == after else f"was {str(before)[:200]}, is {str(after)[:200]}"

    entry = "gr prepare events --vocabulary" if prepares else "reading"
    return Trial(f"{entry}, {name}, {'signed, ' * signed}{mutation}", run, difference)
