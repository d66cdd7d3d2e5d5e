"""`gr prepare` on tiny files in the official layouts, and on the real ones where they are."""

import hashlib
import json
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from gr.cli.prepare import command
from gr.data.dataset import Dataset
from gr.errors import DataError

# user, item, rating, time; user 2's events are tied, user 1's out of order
EVENTS = [(2, 3, 5, 100), (1, 5, 3, 30), (1, 2, 4, 20), (2, 1, 4, 100), (2, 2, 1, 100), (1, 1, 5, 40), (1, 3, 2, 20)]
SEQUENCES = {1: [2, 3, 5, 1], 2: [3, 1, 2]}
TITLES = {1: "Toy Story", 2: 'Jumanji, the "film"', 3: "Été", 5: "Heat", 7: "Never rated"}

OFFICIAL = {
    "movielens-100k": {
        "u.data": "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in EVENTS).encode(),
        "u.item": "".join(f"{i}|{title}|01-Jan-1995\n" for i, title in TITLES.items()).encode("latin-1"),
    },
    "movielens-1m": {
        "ratings.dat": "".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in EVENTS).encode(),
        "movies.dat": "".join(f"{i}::{title}::Drama\n" for i, title in TITLES.items()).encode("latin-1"),
    },
    "movielens-20m": {
        "ratings.csv": b"userId,movieId,rating,timestamp\n"
        + "".join(f"{u},{i},{r - 1}.5,{t}\n" for u, i, r, t in EVENTS).encode(),
        "movies.csv": b"movieId,title,genres\n"
        + "".join('{},"{}",Drama\n'.format(i, title.replace('"', '""')) for i, title in TITLES.items()).encode(),
    },
}
RECBOLE = {
    "ml-100k.inter": b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    + OFFICIAL["movielens-100k"]["u.data"],
    "ml-100k.item": b"item_id:token\tmovie_title:token_seq\n"
    + "".join(f"{i}\t{title}\n" for i, title in TITLES.items()).encode(),
}
LAYOUTS = [*OFFICIAL.items(), ("movielens-100k", RECBOLE)]


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def prepare(name: str, source: object, out: Path, *more: str) -> Result:
    return CliRunner().invoke(command, [name, "--source", str(source), "--out", str(out), *more])


def sequences(folder: Path) -> dict[int, list[int]]:
    dataset = Dataset.open(folder)
    out = {}
    for index in range(len(dataset.row_groups)):
        group = dataset.read_row_group(index, ["user_id", *["timestamps"] * dataset.schema.timestamps])
        items = np.split(group.columns["item_ids"], group.offsets[1:-1])
        out |= dict(zip(group.columns["user_id"].tolist(), [row.tolist() for row in items], strict=True))
    return out


@pytest.mark.parametrize(("name", "files"), LAYOUTS)
def test_official_layouts(tmp_path: Path, name: str, files: dict[str, bytes]) -> None:
    assert prepare(name, put(tmp_path / "raw", files), tmp_path / "out").exit_code == 0
    assert sequences(tmp_path / "out") == SEQUENCES
    dataset = Dataset.open(tmp_path / "out")
    schema = dataset.schema
    assert (schema.users, schema.events, schema.items, schema.item_cardinality) == (2, 7, 5, 8)
    assert schema.timestamps and schema.ratings and "ties in the order of lines in" in schema.order
    ids, counts = dataset.corpus()
    assert ids.tolist() == list(TITLES) and counts.tolist() == [0, 1, 2, 0, 0]  # without each user's newest two
    group = dataset.read_row_group(0, ["timestamps", "ratings"])
    assert group.columns["timestamps"].tolist() == [20, 20, 30, 40, 100, 100, 100]
    assert group.columns["ratings"][:2].tolist() in ([4.0, 2.0], [3.5, 1.5])


def test_zip_and_checksum(tmp_path: Path) -> None:
    archive = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for name, content in OFFICIAL["movielens-1m"].items():
            out.writestr(f"ml-1m/{name}", content)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert prepare("movielens-1m", archive, tmp_path / "out", "--sha256", digest).exit_code == 0
    assert sequences(tmp_path / "out") == SEQUENCES
    failed = prepare("movielens-1m", archive, tmp_path / "other", "--sha256", "0" * 64)
    assert isinstance(failed.exception, DataError) and f"sha256 is {digest}" in str(failed.exception)
    assert not (tmp_path / "other").exists()


def test_download(tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    with zipfile.ZipFile(served / "ml-1m.zip", "w") as out:
        for name, content in OFFICIAL["movielens-1m"].items():
            out.writestr(f"ml-1m/{name}", content)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        result = prepare("movielens-1m", f"{url}/ml-1m.zip", tmp_path / "got" / "out")
        assert result.exit_code == 0, result.exception
        assert sequences(tmp_path / "got" / "out") == SEQUENCES
        failed = prepare("movielens-1m", f"{url}/none.zip", tmp_path / "got" / "other")
        assert isinstance(failed.exception, DataError) and "download failed: HTTP Error 404" in str(failed.exception)
    finally:
        server.shutdown()
        server.server_close()
    assert sorted(p.name for p in (tmp_path / "got").iterdir()) == ["ml-1m.zip", "out"]


def test_existing_out_is_refused_unless_forced(tmp_path: Path) -> None:
    raw = put(tmp_path / "raw", OFFICIAL["movielens-1m"])
    put(tmp_path / "out", {"precious": b"x", "schema.json": b"{}"})
    failed = prepare("movielens-1m", raw, tmp_path / "out")
    assert isinstance(failed.exception, DataError) and "--force" in str(failed.exception)
    assert (tmp_path / "out" / "precious").exists()
    (raw / "ratings.dat").write_bytes(b"1::2::x::3\n")
    assert prepare("movielens-1m", raw, tmp_path / "out", "--force").exit_code != 0
    assert (tmp_path / "out" / "precious").exists()  # a failure leaves what was there
    put(raw, OFFICIAL["movielens-1m"])
    assert prepare("movielens-1m", raw, tmp_path / "out", "--force").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw"]
    assert not (tmp_path / "out" / "precious").exists()


def test_force_replaces_data_folders_only(tmp_path: Path) -> None:
    raw = put(tmp_path / "raw", OFFICIAL["movielens-1m"])
    put(tmp_path / "thesis", {"chapter1.tex": b"x"})
    failed = prepare("movielens-1m", raw, tmp_path / "thesis", "--force")
    assert isinstance(failed.exception, DataError) and "is no data folder" in str(failed.exception)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


@pytest.mark.parametrize(
    ("name", "file", "line", "bad", "message"),
    [
        (
            "movielens-1m",
            "ratings.dat",
            4,
            "1::2::3",
            "line 4: has 3 fields, wanted 4 (user, item, rating, time): '1::2::3'",
        ),
        ("movielens-1m", "ratings.dat", 4, "1::2,3::4::5", "line 4, column item: '2,3' is not a whole number"),
        ("movielens-1m", "ratings.dat", 1, "1::2:3::4::5", "line 1, column item: '2:3' is not a whole"),
        ("movielens-1m", "ratings.dat", 6, "", "line 6: has 1 fields, wanted 4"),
        ("movielens-1m", "ratings.dat", 2, "0::2::3::5", "line 2, column user: is 0, allowed are 1 to 2147483644"),
        ("movielens-1m", "ratings.dat", 2, "0x1::2::3::5", "line 2, column user: '0x1' is not a whole number"),
        ("movielens-1m", "ratings.dat", 2, "1:: 2::3::5", "line 2, column item: ' 2' is not a whole number"),
        ("movielens-1m", "ratings.dat", 2, "1::2::6::5", "line 2, column rating: rating is '6', allowed are 1 to 5"),
        ("movielens-1m", "ratings.dat", 2, "1::2::-1::5", "line 2, column rating: rating is '-1'"),
        ("movielens-1m", "ratings.dat", 2, "1::2::3.5::5", "line 2, column rating: rating is '3.5', allowed"),
        (
            "movielens-1m",
            "ratings.dat",
            2,
            "1::2::3::978342450000",
            "978342450000, which is a time in ms; write it in s",
        ),
        (
            "movielens-1m",
            "ratings.dat",
            2,
            "1::2::3::9223372036854775808",
            "line 2, column time: is 9223372036854775808",
        ),
        ("movielens-1m", "ratings.dat", 2, "1::2::3::1e9", "line 2, column time: '1e9' is not a whole number"),
        ("movielens-1m", "ratings.dat", 2, "2147483640::2::3::5", "the largest user id is 2147483640, though"),
        ("movielens-1m", "movies.dat", 2, "1099511627776::x", "line 2: item id is 1099511627776, allowed"),
        ("movielens-1m", "movies.dat", 2, "2147483640::x", "the largest item id is 2147483640, though there are only"),
        ("movielens-1m", "movies.dat", 2, "1::x", "movies.dat: item 1 has 2 lines; wanted one"),
        ("movielens-100k", "u.data", 3, "1\x012\x013\x015", "line 3: has 1 fields, wanted 4"),
        (
            "movielens-20m",
            "ratings.csv",
            1,
            "1,2,3.5,5",
            "line 1: has no column userId, movieId, rating, timestamp; its",
        ),
        ("movielens-20m", "movies.csv", 1, "1,x,y", "line 1: has no column movieId"),
        ("movielens-1m", "ratings.dat", 2, "1::4::3::5", "line 2: item 4 is not in the list of items"),
        ("movielens-100k", "u.data", 3, "1\t2\tnan\t5", "line 3, column rating: rating is 'nan'"),
        ("movielens-20m", "ratings.csv", 5, "1,,3,5", "line 5, column item: '' is not a whole number"),
        ("movielens-20m", "ratings.csv", 5, "1,2,3,5.5", "line 5, column time: '5.5' is not a whole number"),
        ("movielens-20m", "ratings.csv", 8, "1,99,3,5", "line 8: item 99 is not in the list of items"),
        ("movielens-20m", "movies.csv", 3, "two,x,y", "line 3: item id 'two' is not a whole number"),
        ("movielens-1m", "movies.dat", 2, "2;x", "line 2: '2;x' has no '::'"),
        ("movielens-1m", "movies.dat", 2, "0::x", "line 2: item id is 0, allowed are 1 to"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, name: str, file: str, line: int, bad: str, message: str) -> None:
    raw = put(tmp_path / "raw", OFFICIAL[name])
    lines = (raw / file).read_bytes().splitlines()
    lines[line - 1] = bad.encode()
    (raw / file).write_bytes(b"\n".join(lines) + b"\n")
    result = prepare(name, raw, tmp_path / "out")
    assert isinstance(result.exception, DataError), result.output
    assert file in str(result.exception) and message in str(result.exception)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


def test_no_events_and_no_files(tmp_path: Path) -> None:
    raw = put(tmp_path / "raw", OFFICIAL["movielens-20m"] | {"ratings.csv": b"userId,movieId,rating,timestamp\n"})
    assert "has no events" in str(prepare("movielens-20m", raw, tmp_path / "out").exception)
    assert "has no u.data or ml-100k.inter" in str(prepare("movielens-100k", raw, tmp_path / "out").exception)
    assert "no such file" in str(prepare("movielens-100k", tmp_path / "none", tmp_path / "out").exception)


def test_amazon_books(tmp_path: Path) -> None:
    """Five users rate items b..f; item a has four ratings, user v four, user w falls below five without item a."""
    lines = [(f"u{u}", item, 10 * k + u) for u in range(5) for k, item in enumerate("fedcb")]
    lines += [(f"u{u}", "a", 5) for u in range(3)] + [("w", "a", 1)] + [("w", item, 2) for item in "bcde"]
    lines += [("v", item, 2) for item in "bcde"]
    text = "".join(f"{user},{item},4.0,{time}\n" for user, item, time in lines)
    raw = put(tmp_path / "raw", {"ratings_Books.csv": text.encode()})
    assert prepare("amazon-books", raw, tmp_path / "out").exit_code == 0
    # kept items b..f are 1..5; kept lines' users u0..u4 and w are 1..6, and w has 4 events left
    assert sequences(tmp_path / "out") == {u: [5, 4, 3, 2, 1] for u in range(1, 6)}
    schema = Dataset.open(tmp_path / "out").schema
    assert (schema.items, schema.item_cardinality) == (5, 6)
    (raw / "ratings_Books.csv").write_bytes(text.encode() + b"u1,b,4.0\n")
    failed = str(prepare("amazon-books", raw, tmp_path / "other").exception)
    assert f"line {len(lines) + 1}: has 3 fields, wanted 4 (user, item, rating, time): 'u1,b,4.0'" in failed


@pytest.mark.data
def test_movielens_1m_as_grouped(test_data: Path, tmp_path: Path) -> None:
    assert prepare("movielens-1m", test_data / "ml-1m", tmp_path / "out").exit_code == 0
    dataset = Dataset.open(tmp_path / "out")
    schema = dataset.schema
    assert (schema.users, schema.events, schema.items, schema.item_cardinality) == (6040, 1_000_209, 3883, 3953)
    assert not schema.timestamps and max(dataset.row_counts) == 512
    _, counts = dataset.corpus()
    assert counts.sum() == 1_000_209 - 2 * 6040 and (counts == 0).sum() >= 177
    raw = pq.read_table(test_data / "ml-1m" / "sequences.parquet").slice(5000, 1).to_pylist()[0]
    assert sequences(tmp_path / "out")[raw["user_id"]] == raw["item_ids"]
    assert json.loads((tmp_path / "out" / "schema.json").read_text())["order"].startswith("as given")


@pytest.mark.data
def test_movielens_100k_from_recbole(test_data: Path, tmp_path: Path) -> None:
    assert prepare("movielens-100k", test_data / "ml-100k", tmp_path / "out").exit_code == 0
    schema = Dataset.open(tmp_path / "out").schema
    assert (schema.users, schema.events, schema.items) == (943, 100_000, 1682) and schema.timestamps and schema.ratings
