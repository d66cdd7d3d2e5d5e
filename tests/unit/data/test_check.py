"""gr data check: what is in a folder, and every kind of fault with its count and first place."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.cli import main
from gr.cli.data import screen
from gr.data import check
from gr.data.check import check_folder
from tests.support.tiny_histories import write_histories
from tests.support.tiny_tabular import write_tiny_tabular

Make = Callable[..., Path]
ROWS = [[1, 1, 2], [3, 4], [3], [], [5, 3, 5, 5]]
TIMES = [[0, 0, 86400], [5, 6], [7], [], [1, 2, 2, 2]]


def counted(folder: Path, ids: list[int], counts: list[int]) -> Path:
    pq.write_table(pa.table({"item_id": ids, "count": counts}), folder / "items.parquet")
    schema = folder / "schema.json"
    schema.write_text(json.dumps(json.loads(schema.read_text()) | {"items": len(ids)}))
    return folder


def test_what_is_in_histories(make_folder: Make) -> None:
    """The newest two events of each user are not counted: what stays is item 1 of the first, 5 and 3 of the last."""
    folder = counted(make_folder(ROWS, times=TIMES, cardinality=7), [1, 2, 3, 4, 5, 6], [1, 0, 1, 0, 1, 0])
    result = check_folder(folder)
    facts = dict(result.facts)
    assert result.faults.lines == []
    assert facts["size"] == "5 users, 10 events, 6 items" and facts["time"] == "1970-01-01 to 1970-01-02 UTC"
    assert facts["lengths"] == "min 0, median 2, mean 2.0, p99 4, max 4 events a user"
    assert facts["short"] == "3 (60.0 %) of the users have fewer than 3 events"
    assert facts["repeats"].startswith("2 (20.0 %)") and facts["ties"].startswith("3 (30.0 %)")
    # 3, 3, 2, 1, 1 events of five items: Gini 2 (1 + 2 + 6 + 12 + 15) / (5 * 10) - 6 / 5.
    assert facts["items"] == "the top 1 % have 30.0 % of events, Gini 0.24; 1 of 6 never seen"
    assert result.lengths_N is not None and result.lengths_N.tolist() == [1, 1, 1, 1, 1] and result.days == {0: 9, 1: 1}


def test_every_fault_of_histories(make_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_USERS_AT_ONCE", 2)  # so that ids are read in shares
    rows = [*ROWS, [0, 1], [2, 9], [8], [6, None], None]
    folder = counted(make_folder(rows, cardinality=7), [1, 2, 3, 5], [1, 0, 1, 1])
    part = folder / "part-00001.parquet"
    table = pq.read_table(part)
    pq.write_table(table.set_column(0, "user_id", pa.array([100.0, 100.5])), part)
    lines = check_folder(folder).faults.lines
    assert lines[0].startswith("3 x item_ids is out of range; first: part-00000.parquet, row group 1, row 1: ele")
    assert {line.split(";")[0] for line in lines[1:]} == {
        "1 x item_ids has null elements",
        "1 x item_ids is null",
        "1 x user_id loses its value",
        "2 x user_id is in several rows",
        "1 x items.parquet lacks items of the parts",
    }
    assert any(line.endswith("first: user 100 has 2 rows") for line in lines)


def test_counts_and_events_that_are_wrong(make_folder: Make) -> None:
    folder = counted(make_folder(ROWS, cardinality=7), [1, 2, 3, 4, 5, 6], [1] * 6)
    schema = folder / "schema.json"
    schema.write_text(json.dumps(json.loads(schema.read_text()) | {"events": 9}))
    (events,) = check_folder(folder).faults.lines
    assert events == "1 x schema.json does not fit the parts; first: events=9, the parts hold 10"
    schema.write_text(json.dumps(json.loads(schema.read_text()) | {"events": 99, "users": 6}))
    (totals,) = check_folder(folder).faults.lines
    assert totals.startswith("2 x schema.json does not fit the parts; first: ") and totals.endswith("says users=6")
    schema.write_text(json.dumps(json.loads(schema.read_text()) | {"events": 10, "users": 5}))
    (counts,) = check_folder(folder).faults.lines
    assert counts.startswith("3 x items.parquet counts other events; first: item 2 has count=1, the parts have 0")


def test_a_vocabulary_that_is_not_there(make_folder: Make) -> None:
    folder = counted(make_folder(ROWS, cardinality=7), [1, 2, 3, 4, 5, 6], [1, 0, 0, 0, 1, 0])
    schema = folder / "schema.json"
    schema.write_text(json.dumps(json.loads(schema.read_text()) | {"vocabularies": {"item_id": "x"}}))
    faults = check_folder(folder).faults.lines
    assert any(f"1 x vocabulary of item_id cannot be used; first: {folder}/vocabulary/" in fault for fault in faults)


def test_tabular(tmp_path: Path) -> None:
    folder = write_tiny_tabular(tmp_path / "data")
    facts = dict(check_folder(folder).facts)
    assert facts["size"] == "293 rows, 3 dense and 3 sparse columns" and facts["label"].startswith("label is 1 in ")
    assert facts["c1"].startswith("41 of 41 ids, id 0 in ") and facts["i1"].endswith(", null in 0.0 %")
    part = folder / "part-00001.parquet"
    table = pq.read_table(part)
    changes = {"label": [0.5, None], "i1": [float("inf"), 1e39], "c1": [41.0, 0.5]}
    for name, values in changes.items():
        column = pa.array([*table[name].to_pylist()[:-2], *values], pa.float64())
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, part)
    assert {line.split(";")[0] for line in check_folder(folder).faults.lines} == {
        "1 x label is not 0 or 1",
        "1 x label is null",
        "1 x i1 is not finite",
        "1 x i1 loses its value",
        "1 x c1 is out of range",
        "1 x c1 loses its value",
    }


def test_a_damaged_row_group_does_not_hide_the_others(tmp_path: Path) -> None:
    folder = write_tiny_tabular(tmp_path / "data")
    part = folder / "part-00000.parquet"
    content = bytearray(part.read_bytes())
    content[4:200] = b"\xff" * 196
    part.write_bytes(content)
    (line,) = check_folder(folder).faults.lines
    assert line.startswith("16 x row cannot be read; first: ") and "row group 0: cannot be decoded" in line


@pytest.mark.slow
def test_command_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, picture = tmp_path / "data", tmp_path / "out.png"
    folder.mkdir()
    write_histories(folder)
    assert main(["data", "check", str(folder), "--picture", str(picture)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "faults: none" and len(out) <= 24 and max(map(len, out[1:])) <= 80
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    picture.unlink()
    picture.mkdir()
    assert main(["data", "check", str(folder), "--picture", str(picture)]) == 2
    assert f"--picture={picture}: cannot be written: Is a directory" in capsys.readouterr().err
    (folder / "items.parquet").unlink()
    assert main(["data", "check", str(folder)]) == 2
    assert "1 x items.parquet cannot be used" in capsys.readouterr().out
    tabular = write_tiny_tabular(tmp_path / "tabular")
    for path, problem in (
        (picture, "--picture draws user histories"),
        (tmp_path / "none/a.png", "there is no folder"),
        (tmp_path / "a.jpeg", "name a file that ends in .png or .pdf or .svg"),
    ):
        assert main(["data", "check", str(tabular), "--picture", str(path)]) == 2
        assert problem in capsys.readouterr().err


def test_a_screen_has_24_lines_and_says_what_it_leaves_out() -> None:
    facts, faults = [(f"c{i}", "x " * 50) for i in range(30)], [f"fault {i} " + "y " * 60 for i in range(20)]
    lines = screen("title", facts, faults, 24)
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    (columns,) = (line for line in lines if line.endswith("more columns: see them with --all"))
    assert int(columns.split()[1]) == 30 - sum(line.startswith("c") for line in lines)
    assert (
        lines[-1]
        == f"and {20 - sum(line.startswith('! ') for line in lines)} more kinds of faults: see them with --all"
    )
    assert len(screen("title", facts, faults, None)) == 2 + 60 + 40
