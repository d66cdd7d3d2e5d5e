"""`gr prepare events`: what is kept of a log, how it is split, and what else the folder has."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.api import prepare_events
from gr.cli import main
from gr.data.tabular import TabularDataset
from gr.data.vocabulary import Vocabulary
from gr.schema import DataSchema, TabularSchema
from tests.support.own_log import LOG, TIMED, decoded, prepared, refusal

ITEMS = pd.DataFrame({"i": ["x1", "x2", "zz"], "genre": ["g", "h", "n"], "price": [1.5, 2.0, 9.0]})
USERS = pd.DataFrame({"u": ["c", "b", "a"], "age": [30, 40, 30], "weight": [0.25, 0.5, 0.75]})
Event = tuple[Any, Any, int, int]


def notes(folder: Path) -> str:
    return DataSchema.load(folder).source


def reference(log: list[Event], *, keep: bool, users: int, items: int) -> dict[Any, list[tuple[Any, int, int]]]:
    """Item, time and rating of each user's events, in plain Python: without repeats, k-core, by time, then place."""
    events = [(place, *event) for place, event in enumerate(log)]
    if not keep:
        first = {}
        for place, *event in events:
            first.setdefault(tuple(event), place)
        events = [(place, *event) for event, place in first.items()]
    while True:
        of_user, of_item = Counter(event[1] for event in events), Counter(event[2] for event in events)
        left = [event for event in events if of_user[event[1]] >= users and of_item[event[2]] >= items]
        if len(left) == len(events):
            break
        events = left
    histories: dict[Any, list[tuple[Any, int, int]]] = {}
    for _, user, item, when, rating in sorted(events, key=lambda event: (event[3], event[0])):
        histories.setdefault(user, []).append((item, when, rating))
    return dict(sorted(histories.items()))


IDS = st.one_of(
    st.sampled_from(["", "7", "07", "é", "x'", 'y"', "a,b"]), st.text(max_size=2).filter(lambda t: "\0" not in t)
)
EVENTS = st.lists(st.tuples(IDS, st.integers(-3, 3), st.integers(-2, 2), st.integers(0, 1)), min_size=1, max_size=40)


@pytest.mark.slow
@settings(max_examples=40)
@given(log=EVENTS, keep=st.booleans(), users=st.integers(1, 3), items=st.integers(1, 3))
def test_a_folder_is_the_log_sorted(log: list[Event], keep: bool, users: int, items: int) -> None:
    expected = reference(log, keep=keep, users=users, items=items)
    table = pd.DataFrame(log, columns=["u", "i", "t", "r"])
    options = {**TIMED, "rating": "r", "keep_duplicates": keep, "min_user_events": users, "min_item_events": items}
    with tempfile.TemporaryDirectory() as folder:
        if not expected:
            assert refusal(Path(folder), table, **options) == "no event is left; relax the filters"
            return
        own = decoded(prepared(Path(folder) / "o", table, **options))
    columns = ("item_ids", "timestamps", "ratings")
    assert {u: list(zip(*(own[u][name] for name in columns), strict=True)) for u in own} == expected


@pytest.mark.parametrize("least", [2, 3, 5])
def test_k_core(tmp_path: Path, least: int) -> None:
    random = np.random.default_rng(least)
    log = [(f"u{u}", int(i), t, 0) for t, (u, i) in enumerate(random.integers(0, (30, 25), (150, 2)))]
    expected = reference(log, keep=False, users=least, items=2)
    table = pd.DataFrame(log, columns=["u", "i", "t", "r"])
    folder = prepared(tmp_path / "o", table, **TIMED, min_user_events=least, min_item_events=2)
    own = decoded(folder)
    assert {u: own[u]["item_ids"] for u in own} == {u: [item for item, *_ in events] for u, events in expected.items()}
    left_out = len(set(log)) - sum(map(len, expected.values()))
    assert f"{left_out:,} events left out: of users or items with too few events" in notes(folder)


def test_repeated_events(tmp_path: Path) -> None:
    log = pd.concat([LOG, LOG[:2], LOG[:1].assign(x=9.0)])
    folder = prepared(tmp_path / "joined", log, **TIMED, rating="x")
    assert DataSchema.load(folder).events == 6 and "2 repeated events joined" in notes(folder)
    kept = prepared(tmp_path / "kept", log, **TIMED, rating="x", keep_duplicates=True)
    assert DataSchema.load(kept).events == 8 and "repeated" not in notes(kept)


@pytest.mark.parametrize("label", [None, "l"])
def test_repeats_of_many_ties(tmp_path: Path, label: str | None) -> None:
    """Repeats need not stand side by side, and the first of them stays in its place."""
    random = np.random.default_rng(0)
    log = pd.DataFrame({name: random.integers(0, size, 900) for name, size in (("u", 9), ("i", 7), ("t", 3), ("l", 2))})
    folder = prepared(tmp_path / "o", log, **TIMED, **({"label": label} if label else {"rating": "l"}))
    first = log.drop_duplicates()
    if label:
        expected = first.sort_values("t", kind="stable")
        assert [[row[name] for name in "uil"] for row in rows(folder)] == expected[["u", "i", "l"]].values.tolist()
    else:
        assert {user: columns["item_ids"] for user, columns in decoded(folder).items()} == {
            user: [*events.sort_values("t", kind="stable").i] for user, events in first.groupby("u")
        }


def test_without_times_nothing_is_a_repeat(tmp_path: Path) -> None:
    log = pd.DataFrame({"u": [1, 1, 1, 2, 2], "i": ["a", "b", "a", "a", "a"], "x": [0, 1, 0, 1, 1]})
    folder = prepared(tmp_path / "o", log, user="u", item="i", actions=("x",))
    assert pq.read_table(folder / "part-00000.parquet").column("item_ids").to_pylist() == [[1, 2, 1], [1, 1]]


@pytest.mark.parametrize("column", ["u", "i", "t"])
def test_missing_values(tmp_path: Path, column: str) -> None:
    log = LOG.copy().astype({"t": "Int64"})
    log.loc[[1, 3], column] = None
    log.to_csv(tmp_path / "log.csv", index=False)
    for part in range(2):
        (log[1:] if part else log[:1]).to_parquet(tmp_path / f"part-{part}.parquet")
    for source in (log, tmp_path / "log.csv", str(tmp_path / "part-*.parquet")):
        fault = refusal(tmp_path, source, **TIMED)
        assert fault.startswith(f"row 1 of the log, column {column}: is missing, as in 2 rows"), fault
        folder = prepared(tmp_path / f"o{len(str(source))}", source, **TIMED, on_bad_row="skip")
        assert "2 events left out: u, i, t missing" in notes(folder) and DataSchema.load(folder).events == 3


@pytest.mark.parametrize(
    "source, options, fault",
    [
        (LOG[:0], {}, "a table of pandas: has no rows"),
        (LOG, {"min_user_events": 9}, "no event is left; relax the filters"),
        (LOG, {"since": "2030-01-01"}, "no event is left; relax the filters"),
        (LOG, {"test_from": "2030-01-01"}, "test/ would have no event"),
        (LOG, {"test_from": "2000-01-01"}, "train/ would have no event"),
        (LOG, {"test_from": "2000-01-01", "test_users": 0.5}, "are two ways to split"),
        (LOG, {"features": ("none",)}, "has no column none; it has u, i, t, x, f, l"),
        (LOG.rename(columns={"f": "timestamps"}), {"features": ("timestamps",)}, "another column of this name"),
        (LOG.rename(columns={"f": "item_id"}), {"features": ("item_id",)}, "another column of this name"),
        (LOG, {"features": ("f",), "item_features": ITEMS.rename(columns={"genre": "f"})}, "another column of this"),
        (LOG, {"label": "u"}, "column u: the folder has another column of this name"),
        (LOG, {"label": "l", "rating": "x"}, "--rating and --action make histories"),
        (LOG, {"label": "x"}, "column x: 0.5 is neither 0 nor 1"),
        (LOG.rename(columns={"f": "a/b"}), {"features": ("a/b",)}, "no column of a folder may have this name"),
        (LOG.rename(columns={"f": "a\nb"}), {"features": ("a\nb",)}, "no column of a folder may have this name"),
        (LOG.rename(columns={"f": "a\0b"}), {"features": ("a\0b",)}, "no column of a folder may have this name"),
        (LOG.rename(columns={"f": ".."}), {"features": ("..",)}, "no column of a folder may have this name"),
        (LOG.rename(columns={"f": "a.b"}), {"features": ("a.b",)}, "no table of a model may have this name"),
        (LOG.rename(columns={"f": "type"}), {"features": ("type",)}, "no table of a model may have this name"),
        (LOG.rename(columns={"u": "u.id"}), {"user": "u.id", "label": "l"}, "column u.id: no table of a model may"),
        (LOG.assign(f=None), {"features": ("f",)}, "column f: has"),
        (LOG.assign(x=[1, None, 2, 3, 4]), {"rating": "x"}, "column x: 1 values are missing or no finite numbers"),
        (LOG, {"values": ("f",)}, "column f: 5 values are missing or no finite numbers"),
        (
            pd.concat([LOG.assign(f=str(k)) for k in range(40)]),
            {"actions": ("f",)},
            "has 40 different values, at most 31",
        ),
        (LOG, {"actions": ("l", "l")}, "action l is named twice"),
        (LOG, {"item_features": pd.concat([ITEMS, ITEMS])}, "--item-features: i 'x1' has more than one row"),
        (LOG, {"item_features": ITEMS.assign(i=["p", "q", "r"])}, "--item-features: no i of the log is in the file"),
        (LOG, {"user_features": ITEMS}, "the table: has no column u; it has i, genre, price"),
        (LOG, {"item_features": ITEMS.assign(price=np.inf)}, "column price: has values that are not finite"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, source: Any, options: dict[str, Any], fault: str) -> None:
    assert fault in refusal(tmp_path, source, **(TIMED | options))


def test_actions_of_one_column(tmp_path: Path) -> None:
    """Several of one event are merged."""
    log = pd.concat([LOG.assign(f="view"), LOG[:2].assign(f="it's bought")])
    folder = prepared(tmp_path / "o", log, **TIMED, actions=("f",))
    assert DataSchema.load(folder).actions == ["it's bought", "view"]
    assert {user: columns["actions"] for user, columns in decoded(folder).items()} == {
        "a": [2, 3],
        "b": [3, 2],
        "c": [2],
    }
    assert "2 repeated events joined" in notes(folder)


@pytest.mark.parametrize("form", ["table", "csv"])
def test_actions_of_many_columns(tmp_path: Path, form: str) -> None:
    log = LOG.assign(like=[True, False, True, False, True], share=[0, 1, 1, 0, 1], save=[1.0, None, 0.0, 0.0, 1.0])
    log.to_csv(tmp_path / "log.csv", index=False)
    source = log if form == "table" else tmp_path / "log.csv"
    folder = prepared(tmp_path / "o", source, **TIMED, actions=("like", "share", "save"))
    assert {user: columns["actions"] for user, columns in decoded(folder).items()} == {
        "a": [0, 5],
        "b": [2, 3],
        "c": [7],
    }
    alone = prepared(tmp_path / "alone", source, **TIMED, actions=("like",))
    assert DataSchema.load(alone).actions == ["like"], "a column of true and false is one action"


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_features(tmp_path: Path, form: str) -> None:
    sources: dict[str, Any] = {"item_features": ITEMS, "user_features": USERS}
    for name, table in sources.items():
        if form == "csv":
            table.to_csv(tmp_path / f"{name}.csv", index=False)
        elif form == "json":
            table.to_json(tmp_path / f"{name}.jsonl", orient="records", lines=True)
    if form != "table":
        sources = {name: str(next(tmp_path.glob(f"{name}.*"))) for name in sources}
    folder = prepared(tmp_path / "o", LOG, **TIMED, values=("x",), features=("f",), **sources)
    schema = DataSchema.load(folder)
    assert schema.values == ["x", "price"] and schema.event_features == {"f": 3, "genre": 4}
    assert schema.contextual == {"age": 3} and schema.contextual_numeric == ["weight"]
    assert "1 of 3 items have no features: categories are 0, numbers 0" in notes(folder)
    own = decoded(folder)["b"]
    assert own["x"] == [1.0, 2.0] and own["f"] == ["q", None] and own["genre"] == ["g", None]
    assert own["price"] == [1.5, 0.0] and own["age"] == 40 and own["weight"] == 0.5


def test_feature_files_with_ids_of_another_type(tmp_path: Path) -> None:
    log = LOG.assign(i=[2, 1, 3, 1, 2])
    for ids in ([1.0, 2.0, 9.0], ["1", "2", "9"], np.array([1, 2, 9], dtype=np.uint8)):
        folder = prepared(tmp_path / f"o{ids[0]!r}", log, **TIMED, item_features=ITEMS.assign(i=ids))
        assert decoded(folder)["b"]["genre"] == ["g", None]


def test_split_by_time(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "o", LOG, **TIMED, test_from="2023-11-14T22:14:20")  # at 60 s
    train, test = decoded(folder / "train"), decoded(folder / "test")
    assert {user: columns["item_ids"] for user, columns in train.items()} == {"a": ["x1"], "b": ["x1"]}
    # Whole histories of users with an event from then on; x2 and x3 were not seen, so nothing is left of c.
    assert {user: columns["item_ids"] for user, columns in test.items()} == {"a": ["x1"], "b": ["x1"]}
    assert "test: 3 events of items that train/ lacks are left out" in notes(folder / "test")
    for name in ("item_cardinality", "input_vocabularies"):
        assert getattr(DataSchema.load(folder / "train"), name) == getattr(DataSchema.load(folder / "test"), name)


def test_split_by_users(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    log = pd.DataFrame({"u": random.integers(0, 200, 900), "i": random.integers(0, 20, 900), "t": range(900)})
    folder, again = (
        prepared(tmp_path / name, source, **TIMED, test_users=0.25)
        for name, source in (("o", log), ("again", log[::-1]))
    )
    train, test = decoded(folder / "train"), decoded(folder / "test")
    assert train.keys().isdisjoint(test) and len(train) + len(test) == log.u.nunique()
    assert 0.15 < len(test) / log.u.nunique() < 0.35
    assert decoded(again / "test") == test, "a user's side does not depend on the order of the log"


def test_the_vocabulary_of_another_folder(tmp_path: Path) -> None:
    first = prepared(tmp_path / "first", LOG, **TIMED, features=("f",))
    log = pd.DataFrame({"u": list("vwxz"), "i": ["x3", "x9", "x1", "x3"], "t": range(4), "f": ["q", "p", "new", None]})
    folder = prepared(tmp_path / "o", log, **TIMED, features=("f",), vocabulary=first)
    mine, others = DataSchema.load(folder), DataSchema.load(first)
    assert mine.input_vocabularies == others.input_vocabularies and mine.item_cardinality == others.item_cardinality
    assert {user: (columns["item_ids"], columns["f"]) for user, columns in decoded(folder).items()} == {
        "v": (["x3"], ["q"]),
        "x": (["x1"], [None]),
        "z": (["x3"], [None]),
    }
    assert "1 events left out: of items that --vocabulary lacks" in notes(folder)
    assert "has no vocabulary of x; it has item_id, f, user_id" in refusal(
        tmp_path, LOG, **TIMED, features=("x",), vocabulary=first
    )
    numbers = LOG.assign(i=range(5))
    assert "are not both whole numbers or both text" in refusal(tmp_path, numbers, **TIMED, vocabulary=first)
    assert "is no data folder, but has first, o: name one of them" in refusal(
        tmp_path, LOG, **TIMED, vocabulary=tmp_path
    )
    assert "describes a histories folder" in refusal(tmp_path, LOG, **TIMED, vocabulary=first, label="l")
    file = first / "vocabulary" / "item_id.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "item_id.parquet: is not the file that schema.json names" in refusal(
        tmp_path, LOG, **TIMED, vocabulary=first
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a click folder in its own ids, by the folder's own reader as well."""
    schema, table = TabularSchema.load(folder), pq.read_table(folder / "part-00000.parquet")
    assert TabularDataset.open(folder).read_row_group(0).labels_B.tolist() == table["l"].to_pylist()
    own = {name: Vocabulary.open(folder, schema, name).values(table[name].to_numpy()) for name in schema.vocabularies}
    return pa.table({name: own.get(name, table[name]) for name in table.column_names}).to_pylist()


def test_rows_for_a_click_model(tmp_path: Path) -> None:
    options = {"values": ("x",), "features": ("f",), "item_features": ITEMS, "user_features": USERS}
    folder = prepared(tmp_path / "o", LOG, **TIMED, **options, label="l", test_from="2023-11-14T22:14:30")  # at 70 s
    assert rows(folder / "train") == [
        dict(l=1, x=3.0, weight=0.75, price=1.5, i="x1", u="a", f="p", age=30, genre="g"),
        dict(l=1, x=1.0, weight=0.5, price=1.5, i="x1", u="b", f="q", age=40, genre="g"),
        dict(l=0, x=2.0, weight=0.5, price=0.0, i="x3", u="b", f=None, age=40, genre=None),
    ]
    assert [(row["u"], row["i"], row["l"]) for row in rows(folder / "test")] == [(None, None, 1), ("a", None, 0)]
    train, test = TabularSchema.load(folder / "train"), TabularSchema.load(folder / "test")
    assert train.vocabularies == test.vocabularies and train.sparse == test.sparse
    # The rows of other users and items stay, with id 0; two strangers are not one.
    log = pd.DataFrame({"u": ["v", "w", "a"], "i": "x3", "t": 7, "l": 1, "x": 0.0, "f": "p"})
    more = prepared(
        tmp_path / "more", log, **TIMED, values=("x",), features=("f",), label="l", vocabulary=folder / "train"
    )
    assert [(row["u"], row["i"]) for row in rows(more)] == [(None, "x3"), (None, "x3"), ("a", "x3")]
    assert "2 events of users that are not known have id 0" in TabularSchema.load(more).source


def command(log: Path, out: Path) -> list[str]:
    columns = ["--user", "u", "--item", "i", "--time", "t", "--time-unit", "s"]
    return ["prepare", "events", "--source", str(log), *columns, "--out", str(out)]


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    LOG.to_csv(tmp_path / "log.csv", index=False)
    call = command(tmp_path / "log.csv", tmp_path / "o")
    assert main(call) == 0
    assert capfd.readouterr().out.splitlines()[-1] == f"{tmp_path}/o: 3 users, 5 events, 3 items"
    for arguments, fault in (
        ([*call], "exists already; pass --force"),
        ([*call, "--force", "--feature", "none"], "has no column none"),
        ([*call[:3], str(tmp_path / "none.csv"), *call[4:], "--force"], "none.csv: no such file"),
    ):
        assert main(arguments) == 2
        out, err = capfd.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and fault in err
    assert list(decoded(tmp_path / "o")) == ["a", "b", "c"], "what was there stays"
    assert main([*call, "--force", "--test-users", "0.5"]) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder]).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def large(file: Path, events: int = 100_000) -> Path:
    random = np.random.default_rng(0)
    ids = {"u": random.integers(0, 5000, events), "i": random.integers(0, 3000, events), "t": range(events)}
    pq.write_table(pa.table(ids), file)
    return file


def test_a_full_disk(tmp_path: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(command(large(tmp_path / "log.parquet"), small_disk / "o")) == 2
    assert "No space left on device; make room, or choose another --out" in capfd.readouterr().err
    assert not list(small_disk.iterdir())
    synthetic = ["prepare", "synthetic", "--out", str(small_disk / "o")]
    assert main(synthetic) == 2, "the other commands as well"
    assert "No space left on device; make room, or choose another --out" in capfd.readouterr().err.splitlines()[-1]
    assert not list(small_disk.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_it_is_ended(tmp_path: Path, sent: signal.Signals) -> None:
    log, folder = large(tmp_path / "log.parquet", 4_000_000), tmp_path / "out"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "gr", *command(log, folder / "o")], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob(".events.*/events.db")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sent)  # the log is being read
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.splitlines()[-1] == "interrupted"
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """8 million events, 190 MB as columns, with 0.25 GiB."""
    log = large(tmp_path / "log.parquet", 8_000_000)
    # Not ru_maxrss, in which Linux counts what the parent had before exec.
    code = (
        "import sys; from gr.cli import main; assert main(sys.argv[1:]) == 0; "
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    call = [sys.executable, "-c", code, *command(log, tmp_path / "o"), "--memory", "0.25", "--keep-duplicates"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 700 * 1024


def test_a_table_of_python(tmp_path: Path) -> None:
    schemas = prepare_events(pa.table({"u": [1, 1], "i": [5, 6]}), tmp_path / "o", user="u", item="i")
    assert schemas[""].summary() == "1 users, 2 events, 2 items"
