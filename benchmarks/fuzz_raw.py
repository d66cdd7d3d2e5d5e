"""Targets of benchmarks.fuzz: raw text files and archives of `gr prepare`.

Text has no checksum, so a changed digit may be another number: what `gr prepare` writes is compared with what a second,
plain reader finds in the same damaged file, and which knows no blanks, no quotes and no floats for whole numbers.
"""

import bz2
import gzip
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.fuzz import Trial, target
from benchmarks.mutations import changed, damaged
from gr.cli import main
from gr.prepare.kuairand import ACTIONS, USER_FEATURES

WHOLE, STARS, HEX = re.compile(rb"-?\d+"), re.compile(rb"\d(\.\d+)?"), re.compile(rb"[0-9a-fA-F]{8}")
BOM = b"\xef\xbb\xbf"
TIME = 978300000
RATED = [(1 + n % 6, 1 + (n * 5 + n // 6) % 7, 1 + n % 5, TIME + n * 37 % 500) for n in range(60)]
LAYOUTS = {
    "movielens-100k": ("u.data", b"\t", b"", "u.item", b"|", b""),
    "movielens-1m": ("ratings.dat", b"::", b"", "movies.dat", b"::", b""),
    "movielens-20m": (
        "ratings.csv",
        b",",
        b"userId,movieId,rating,timestamp\n",
        "movies.csv",
        b",",
        b"movieId,title\n",
    ),
}
KUAIRAND = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
LOGS = ("log_standard_4_08_to_4_21_1k.csv", "log_standard_4_22_to_5_08_1k.csv", "log_random_4_22_to_5_08_1k.csv")


class Wrong(Exception):
    """The plain reader finds no good file."""


def lines_of(text: bytes) -> Iterator[bytes]:
    lines = text.removeprefix(BOM).rstrip(b"\r\n").split(b"\n")
    return (line.removesuffix(b"\r") for line in lines if text.strip(BOM + b"\r\n"))


def whole(field: bytes) -> int:
    if not WHOLE.fullmatch(field) or len(field) > 4000:
        raise Wrong(f"{field!r} is no whole number")
    return int(field)


def rows_of(text: bytes, separator: bytes, header: bytes, names: list[str]) -> Iterator[dict[str, bytes]]:
    lines = lines_of(text)
    if header:
        columns = next(lines, b"").split(separator)
        written = dict(zip(header.strip().split(separator), names, strict=False))
        names = [written.get(column, repr(column)) for column in columns]
    for line in lines:
        fields = line.split(separator)
        if len(fields) != len(names):
            raise Wrong(f"{len(fields)} fields")
        yield dict(zip(names, fields, strict=True))


def rated(text: bytes, separator: bytes, header: bytes, identity: Callable[[bytes], object]) -> list[tuple]:
    """(user, item, rating, time) of each line. Wrong for a line that is none."""
    events = []
    for row in rows_of(text, separator, header, ["user", "item", "rating", "time"]):
        try:
            event = identity(row["user"]), identity(row["item"]), float(row["rating"]), whole(row["time"])
        except (KeyError, ValueError) as error:
            raise Wrong(repr(error)) from None
        if not STARS.fullmatch(row["rating"]) or not 0.5 <= event[2] <= 5 or not 0 <= event[3] < 10**11:
            raise Wrong(f"{event} is out of range")
        events.append(event)
    return events


def histories(events: list[tuple], others: Callable[[tuple], list]) -> dict[int, list]:
    """Events by user in order of time, as lists of what `others` makes of each."""
    users: dict[int, list] = {}
    for event in sorted(events, key=lambda event: event[3]):
        users.setdefault(event[0], []).append(others(event))
    return users


def written(out: Path, names: list[str]) -> dict[int, list]:
    """Events of each user in a data folder, as lists of the named columns."""
    rows = [row for part in sorted(out.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    return {row["user_id"]: [list(event) for event in zip(*(row[name] for name in names), strict=True)] for row in rows}


def compared(expected: Callable[[], dict], actual: Callable[[], dict]) -> Callable[[], str | None]:
    def difference() -> str | None:
        try:
            wanted = expected()
        except Wrong as error:
            return f"accepted, though {error}"
        return None if wanted == (found := actual()) else f"wanted {str(wanted)[:300]}, wrote {str(found)[:300]}"

    return difference


def prepare(name: str, source: Path, out: Path) -> Callable[[], int]:
    return lambda: main(["prepare", name, "--source", str(source), "--out", str(out)])


def movielens_files(name: str) -> dict[str, bytes]:
    ratings, separator, header, movies, bar, movie_header = LAYOUTS[name]
    lines = [separator.join(str(value).encode() for value in event) for event in RATED]
    items = [bar.join([str(item).encode(), b'T, "x"', b"Drama"]) for item in range(1, 9)]
    return {ratings: header + b"\n".join([*lines, b""]), movies: movie_header + b"\n".join([*items, b""])}


def movielens_events(name: str, text: bytes) -> dict[int, list]:
    _, separator, header, *_ = LAYOUTS[name]
    return histories(rated(text, separator, header, whole), lambda event: [event[1], event[3], event[2]])


@target("movielens")
def movielens(random: np.random.Generator, folder: Path) -> Trial:
    name = str(random.choice(list(LAYOUTS)))
    files = movielens_files(name)
    ratings, separator, _, movies, bar, _ = LAYOUTS[name]
    file = ratings if random.random() < 0.7 else movies
    files[file], mutation = changed(random, files[file], separator if file == ratings else bar)
    for each, content in files.items():
        (folder / each).write_bytes(content)
    columns = ["item_ids", "timestamps", "ratings"]
    difference = compared(lambda: movielens_events(name, files[ratings]), lambda: written(folder / "out", columns))
    return Trial(f"{file}, {mutation}", prepare(name, folder, folder / "out"), difference)


def unpacked(content: bytes) -> bytes:
    """The text in a zstd file, or what is no line where it is damaged."""
    try:
        with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as stream:
            return stream.read()
    except OSError:
        return b"damaged"


@target("archives")
def archives(random: np.random.Generator, folder: Path) -> Trial:
    """A zip archive, or gzip, bzip2 or zstd beside a good list of movies. They have checksums."""
    name = str(random.choice(list(LAYOUTS)))
    files = movielens_files(name)
    ratings, *_ = LAYOUTS[name]
    kind = str(random.choice(["zip", "gz", "bz2", "zst"], p=[0.6, 0.15, 0.15, 0.1]))
    source = folder / "x.zip" if kind == "zip" else folder
    if kind == "zip":
        method = int(random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
        with zipfile.ZipFile(source, "w", method) as archive:
            for each, content in files.items():
                archive.writestr(each, content)
        damage, mutation = damaged(random, source.read_bytes())
        source.write_bytes(damage)
    else:
        for each, content in files.items():
            (folder / each).write_bytes(content)
        pack = {"gz": gzip.compress, "bz2": bz2.compress, "zst": lambda text: pa.compress(text, "zstd", asbytes=True)}
        damage, mutation = damaged(random, pack[kind](files[ratings]))
        (folder / ratings).rename(folder / f"{ratings}.{kind}")
        (folder / f"{ratings}.{kind}").write_bytes(damage)
        if kind == "zst":  # Arrow writes no checksum
            files[ratings] = unpacked(damage)
    columns = ["item_ids", "timestamps", "ratings"]
    difference = compared(lambda: movielens_events(name, files[ratings]), lambda: written(folder / "out", columns))
    return Trial(f"{kind}, {mutation}", prepare(name, source, folder / "out"), difference)


def printable(field: bytes) -> bytes:
    if not field or any(byte < 33 or byte > 126 or byte == 34 for byte in field):
        raise Wrong(f"{field!r} is no name")
    return field


def amazon_events(text: bytes) -> dict[int, list]:
    """The filter of the paper: items and users with 5 lines, then users with 5 events left; numbered by name."""
    events = rated(text, b",", b"", printable)
    users, items = Counter(event[0] for event in events), Counter(event[1] for event in events)
    events = [event for event in events if users[event[0]] >= 5 and items[event[1]] >= 5]
    left = Counter(event[0] for event in events)
    user, item = ({name: n for n, name in enumerate(sorted({e[i] for e in events}), 1)} for i in (0, 1))
    events = [(user[u], item[i], rating, time) for u, i, rating, time in events if left[u] >= 5]
    return histories(events, lambda event: [event[1], event[3], event[2]])


@target("amazon")
def amazon(random: np.random.Generator, folder: Path) -> Trial:
    lines = [b"A%dU,B%03d,%d.0,%d" % (user, item, rating, time) for user, item, rating, time in RATED]
    text, mutation = changed(random, b"\n".join([*lines, b""]), b",")
    (folder / "ratings_Books.csv").write_bytes(text)
    columns = ["item_ids", "timestamps", "ratings"]
    difference = compared(lambda: amazon_events(text), lambda: written(folder / "out", columns))
    return Trial(mutation, prepare("amazon-books", folder, folder / "out"), difference)


def kuairand_log(random: np.random.Generator, lines: int) -> bytes:
    rows = [KUAIRAND]
    for n in range(lines):
        flags = random.integers(0, 2, 7).tolist()
        play, rand, tab = int(random.integers(20000)), int(random.integers(2)), int(random.integers(15))
        head = [n % 5, int(random.integers(40)), 20220421, 400, 1650485801301 + int(random.integers(10**6)), *flags]
        rows.append(",".join(map(str, [*head, play, 10000, 0, 0, n % 2, rand, tab])))
    return "\n".join([*rows, ""]).encode()


def kuairand_files(random: np.random.Generator, lines: int) -> dict[str, bytes]:
    names = ["user_id", *USER_FEATURES]
    people = [",".join(names), *(f'{user},{"x" * user},"(0,10]",' + ",".join("102030" * 4) for user in range(4))]
    return {name: kuairand_log(random, lines) for name in LOGS} | {"user_features_1k.csv": "\n".join(people).encode()}


def kuairand_events(texts: list[bytes]) -> dict[int, list]:
    events = []
    for text in texts:
        columns = KUAIRAND.split(",")
        for row in rows_of(text, b",", KUAIRAND.encode(), columns):
            if missing := set(columns) - {"date", "hourmin", "profile_stay_time", "comment_stay_time"} - row.keys():
                raise Wrong(f"no column {missing}")
            e = {name: whole(row[name]) for name in columns if name in row and WHOLE.fullmatch(row[name])}
            try:
                bits = sum(e[name] << bit for bit, name in enumerate(ACTIONS))
                fraction = float(np.float32(e["play_time_ms"] / e["duration_ms"])) if e["duration_ms"] else 0.0
                shown = [e["video_id"] + 1, e["time_ms"], bits, fraction, e["tab"] + 1, e["is_rand"] + 1]
                events.append((e["user_id"], 0, 0, e["time_ms"], shown))
            except KeyError as error:
                raise Wrong(f"{error} is no whole number") from None
            if bits > 255 or not 0 <= e["tab"] < 15 or not 10**11 <= e["time_ms"] < 10**14:
                raise Wrong(f"{shown} is out of range")
    return histories(events, lambda event: event[4])


@target("kuairand")
def kuairand(random: np.random.Generator, folder: Path) -> Trial:
    texts = kuairand_files(random, 20)
    file = str(random.choice(list(texts), p=[0.3, 0.3, 0.2, 0.2]))
    texts[file], mutation = changed(random, texts[file], b",")
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    columns = ["item_ids", "timestamps", "actions", "watch_fraction", "tab", "exposure"]
    difference = compared(
        lambda: kuairand_events([texts[name] for name in LOGS]), lambda: written(folder / "out", columns)
    )
    return Trial(f"{file}, {mutation}", prepare("kuairand-1k", folder, folder / "out"), difference)


def criteo_rows(texts: list[bytes]) -> dict[str, list]:
    """Columns of the rows of all files."""
    rows = []
    for text in texts:
        for line in lines_of(text):
            fields = line.split(b"\t")
            if len(fields) != 40 or fields[0] not in (b"0", b"1"):
                raise Wrong(f"{len(fields)} fields, label {fields[0]!r}")
            counts = [whole(field) if field else 0 for field in fields[1:14]]
            if wrong := [field for field in fields[14:] if field and not HEX.fullmatch(field)]:
                raise Wrong(f"{wrong[0]!r} is no category")
            rows.append((int(fields[0]), counts, [int(field, 16) if field else None for field in fields[14:]]))
    columns: dict[str, list] = {"label": [label for label, _, _ in rows]}
    for place in range(13):
        dense = np.log1p(np.maximum([float(counts[place]) for _, counts, _ in rows], 0)).astype(np.float32)
        columns[f"i{place + 1}"] = dense.tolist()
    for place in range(26):
        values = [values[place] for _, _, values in rows]
        ids = {value: n for n, value in enumerate(sorted({v for v in values if v is not None}), 1)}
        columns[f"c{place + 1}"] = [ids.get(value, 0) for value in values]
    return columns


@target("criteo")
def criteo(random: np.random.Generator, folder: Path) -> Trial:
    texts = []
    for _ in range(2):
        counts, values = random.integers(-1, 300, (20, 13)), random.integers(0, 9, (20, 26)) * 286331153
        keep = random.random((20, 39)) < 0.9
        rows = [[*map(str, counts[n]), *(f"{value:08x}" for value in values[n])] for n in range(20)]
        lines = [
            "\t".join([str(n % 2), *(f if k else "" for f, k in zip(rows[n], keep[n], strict=True))]) for n in range(20)
        ]
        texts.append("\n".join([*lines, ""]).encode())
    packed = random.random() < 0.2
    file = int(random.integers(2))
    if not packed:
        texts[file], mutation = changed(random, texts[file], b"\t")
    content = {f"day_{n}{'.gz' * packed}": gzip.compress(text) if packed else text for n, text in enumerate(texts)}
    if packed:
        content[f"day_{file}.gz"], mutation = damaged(random, content[f"day_{file}.gz"])
    for name, text in content.items():
        (folder / name).write_bytes(text)

    def actual() -> dict:
        parts = sorted((folder / "out").glob("part-*.parquet"))
        return pa.concat_tables(pq.read_table(part) for part in parts).to_pydict()

    difference = compared(lambda: criteo_rows(texts), actual)
    return Trial(f"day_{file}{'.gz' * packed}, {mutation}", prepare("criteo", folder, folder / "out"), difference)
