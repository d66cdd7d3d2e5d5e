"""`gr prepare yambda` on generated files of the published layout.

Layout: the card and previews of huggingface.co/datasets/yandex/yambda. The real files are not among the test data.
"""

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.cli.prepare import command
from gr.data.dataset import Dataset
from gr.errors import DataError
from gr.prepare.yambda import ACTIONS
from tests.support.history_folder import histories_by_user

Event = tuple[int, int, int, str, int]  # uid, timestamp, item_id, event_type, played_ratio_pct
EVENTS: list[Event] = [
    (20, 15, 300, "listen", 120),
    (10, 500, 7, "like", 0),
    (20, 10, 7, "listen", 50),
    (20, 15, 9, "unlike", 0),
    (10, 5, 300, "listen", 51),
    (20, 20, 9, "dislike", 0),
    (20, 25, 9, "undislike", 0),
]
NAMES = {"listen": "listens", "like": "likes", "dislike": "dislikes", "unlike": "unlikes", "undislike": "undislikes"}


def table(events: list[Event], *, kinds: bool = True, listens: bool = True) -> pa.Table:
    """Organic where the item is odd. The two columns of listens are null in other events."""
    heard = [event[3] == "listen" for event in events]
    columns = {
        "uid": pa.array([event[0] for event in events], pa.uint32()),
        "timestamp": pa.array([event[1] for event in events], pa.uint32()),
        "item_id": pa.array([event[2] for event in events], pa.uint32()),
        "is_organic": pa.array([event[2] % 2 for event in events], pa.uint8()),
    }
    if listens:
        played = [event[4] if one else None for event, one in zip(events, heard, strict=True)]
        columns["played_ratio_pct"] = pa.array(played, pa.uint16())
        columns["track_length_seconds"] = pa.array([180 if one else None for one in heard], pa.uint32())
    if kinds:
        columns["event_type"] = pa.array([event[3] for event in events], pa.string()).dictionary_encode()
    return pa.table(columns)


def put(folder: Path, events: list[Event] = EVENTS, *, size: str = "50m", single: bool = False) -> Path:
    flat = folder / "flat" / size
    flat.mkdir(parents=True)
    if single:
        for kind, name in NAMES.items():
            own = [event for event in events if event[3] == kind]
            pq.write_table(table(own, kinds=False, listens=kind == "listen"), flat / f"{name}.parquet")
    else:
        pq.write_table(table(events), flat / "multi_event.parquet")
    for name, pairs in {"artist": [(4, 7), (2, 7), (0, 300)], "album": [(11, 7), (12, 9)]}.items():
        ids, items = (pa.array(column, pa.uint32()) for column in zip(*pairs, strict=True))
        pq.write_table(pa.table({f"{name}_id": ids, "item_id": items}), folder / f"{name}_item_mapping.parquet")
    return folder


def prepare(source: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(command, ["yambda", "--source", str(source), "--out", str(out), *more])


def failure(source: Path, out: Path, *more: str) -> str:
    error = prepare(source, out, *more).exception
    assert isinstance(error, DataError), error
    assert not out.exists()
    return str(error)


def test_events_of_all_kinds_in_order_of_time(tmp_path: Path) -> None:
    result = prepare(put(tmp_path / "y"), tmp_path / "out")
    assert result.exit_code == 0, result.exception
    assert "2 users, 7 events, 3 candidate items" in result.output
    schema, histories = Dataset.open(tmp_path / "out").schema, histories_by_user(tmp_path / "out")
    assert (schema.time_unit, schema.actions, schema.values) == ("s", list(ACTIONS), ["played_ratio"])
    assert schema.event_features == {"artist": 4, "album": 14, "organic": 3} and schema.contextual == {"user": 22}
    assert "seconds since an unpublished day, in steps of 5" in schema.source
    assert "1 items without artist; 1 items without album" in schema.source
    mine = histories[20]
    assert mine["item_ids"] == [7, 300, 9, 9, 9] and mine["timestamps"] == [10, 15, 15, 20, 25]
    bit = {name: 1 << place for place, name in enumerate(ACTIONS)}
    listened = bit["listen"] | bit["listen_plus"]
    assert mine["actions"] == [bit["listen"], listened, bit["unlike"], bit["dislike"], bit["undislike"]]
    assert mine["played_ratio"] == pytest.approx([0.5, 1.2, 0, 0, 0])
    assert mine["artist"] == [3, 1, 0, 0, 0], "the least of several, from 1"
    assert mine["album"] == [12, 0, 13, 13, 13] and mine["organic"] == [2, 1, 2, 2, 2]
    assert mine["user"] == 21 and histories[10]["actions"] == [listened, bit["like"]]


def test_files_of_single_kinds_give_the_same_histories(tmp_path: Path) -> None:
    """But for ties, which are then in the order of the kinds: (20, 15) is a listen and an unlike, in both."""
    assert prepare(put(tmp_path / "a"), tmp_path / "all").exit_code == 0
    assert prepare(put(tmp_path / "s", single=True, size="5b"), tmp_path / "single", "--size", "5b").exit_code == 0
    assert histories_by_user(tmp_path / "all") == histories_by_user(tmp_path / "single")
    assert Dataset.open(tmp_path / "single").schema.name == "yambda-5b"


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("item_id", pa.array([1, 0, 1], pa.uint32()), ", row 1, column item_id: is 0, allowed are 1 to"),
        ("item_id", pa.array([1, 1, 2**32 - 1], pa.uint32()), ", row 2, column item_id: is 4294967295, allowed"),
        ("uid", pa.array([1, None, 1], pa.uint32()), ", row 1, column uid: is null"),
        ("timestamp", pa.array([-5, 1, 1], pa.int64()), ", row 0, column timestamp: is -5, allowed are 0 to"),
        ("timestamp", pa.array([0.5, 1, 1]), ": column timestamp has type double, wanted whole numbers"),
        ("is_organic", pa.array([0, 1, 2], pa.uint8()), ", row 2, column is_organic: is 2, allowed are 0 to 1"),
        ("played_ratio_pct", pa.array([3, None, 3], pa.uint16()), ", row 1, column played_ratio_pct: is null for a"),
        ("event_type", pa.array(["listen", "skip", None]), ", row 1, column event_type: is 'skip', allowed are listen"),
        ("event_type", pa.array([1, 2, 3]), ": column event_type has type int64, wanted text"),
    ],
)
def test_bad_values(tmp_path: Path, column: str, values: pa.Array, problem: str) -> None:
    source = put(tmp_path / "y")
    file = source / "flat/50m/multi_event.parquet"
    good = table([(1, 5, 1, "listen", 10)] * 3)
    pq.write_table(good.set_column(good.schema.get_field_index(column), column, values), file)
    assert f"{file}{problem}" in failure(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["y"], "nothing is left behind"


def test_bad_rows_are_left_out_and_counted_when_asked(tmp_path: Path) -> None:
    source = put(tmp_path / "y")
    file = source / "flat/50m/multi_event.parquet"
    rows = table([*EVENTS, (1, 5, 0, "listen", 10), (1, 5, 0, "like", 0), (1, 5, 3, "skip", 10)])
    pq.write_table(rows, file)
    assert f"{file}, row 9, column event_type: is 'skip'" in failure(source, tmp_path / "out")
    result = prepare(source, tmp_path / "out", "--on-bad-row", "skip")
    assert result.exit_code == 0 and "3 bad events left out: event_type 1, item_id 2" in result.output
    assert prepare(put(tmp_path / "good"), tmp_path / "wanted").exit_code == 0
    assert histories_by_user(tmp_path / "out") == histories_by_user(tmp_path / "wanted")


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    source = put(tmp_path / "y")
    file = source / "flat/50m/multi_event.parquet"
    assert f"{source}/flat/500m: has neither multi_event.parquet nor listens.parquet, likes.parquet" in failure(
        source, tmp_path / "out", "--size", "500m"
    )
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    assert f"{file}: is not a whole Parquet file" in failure(source, tmp_path / "out")
    file.write_bytes(whole)
    pq.write_table(table(EVENTS).drop_columns(["is_organic", "uid"]), file)
    assert f"{file}: has no column uid, is_organic; its columns are timestamp" in failure(source, tmp_path / "out")
    pq.write_table(table([]), file)
    assert f"{file}: has no events" in failure(source, tmp_path / "out")
    (source / "album_item_mapping.parquet").unlink()
    assert "album_item_mapping.parquet: no such file; --source needs it beside flat/" in failure(
        source, tmp_path / "out"
    )


RANDOM_EVENTS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 400), st.sampled_from(list(NAMES)), st.integers(0, 200)), min_size=1
)


@settings(max_examples=25)
@given(RANDOM_EVENTS, st.randoms(use_true_random=False))
def test_any_order_of_rows_with_distinct_times_gives_the_same_folder(events: list, random: object) -> None:
    ordered: list[Event] = [(u, 5 * place, i, kind, pct) for place, (u, i, kind, pct) in enumerate(events)]
    shuffled = list(ordered)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, given_events in (("a", ordered), ("b", shuffled)):
            assert prepare(put(folder / name, given_events), folder / f"{name}-out").exit_code == 0
        contents = [
            {path.name: path.read_bytes() for path in (folder / f"{name}-out").glob("*.parquet")} for name in "ab"
        ]
        counts = sum(len(history["item_ids"]) for history in histories_by_user(folder / "a-out").values())
    assert contents[0] == contents[1] and counts == len(events)
