"""MovieLens 100K, 1M and 20M (grouplens.org), as published, and two public regroupings of them.

No filtering and no new ids: an item id is the movie id, the corpus is the whole list of movies, rated or not.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.errors import DataError
from gr.prepare.delimited import LARGEST_ID, SECONDS, Field, Lines, Stars, Whole, header_of, require_dense
from gr.prepare.lines import shown, text_blocks
from gr.prepare.ratings import STABLE_ORDER, group_users
from gr.prepare.source import Source, SourceFile
from gr.prepare.write import Users, write_folder
from gr.schema import DataSchema, HistoryColumns

_ID = Whole(1, LARGEST_ID)
_FIELDS: dict[str, Field] = {"user": _ID, "item": _ID, "rating": Stars(1, 1), "time": SECONDS}
_HALVES = _FIELDS | {"rating": Stars(0.5, 0.5)}
_RECBOLE_HEADER = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")


@dataclass(frozen=True)
class Layout:
    """One published layout: ratings, and the list of movies, whose first field is the id. header: the id's name."""

    ratings: str
    lines: Lines
    movies: str
    separator: str
    header: str | None = None


_U_DATA = Layout("u.data", Lines("\t", _FIELDS), "u.item", "|")
_RECBOLE = Layout(
    "ml-100k.inter",
    Lines("\t", _FIELDS, dict(zip(_FIELDS, _RECBOLE_HEADER, strict=True))),
    "ml-100k.item",
    "\t",
    "item_id:token",
)
_CSV = Lines(",", _HALVES, {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"})
_LAYOUTS = {
    "movielens-100k": [_U_DATA, _RECBOLE],
    "movielens-1m": [Layout("ratings.dat", Lines("::", _FIELDS), "movies.dat", "::")],
    "movielens-20m": [Layout("ratings.csv", _CSV, "movies.csv", ",", "movieId")],
}
_GROUPED = "sequences.parquet"
_STARS = (2, 3, 4, 5)


def prepare_movielens(name: str, source: Source, folder: Path) -> DataSchema:
    """Write movielens-100k, movielens-1m or movielens-20m into an empty folder. DataError as in delimited.py."""
    layouts = _LAYOUTS[name]
    file = source.require(*(layout.ratings for layout in layouts), *[_GROUPED] * (name == "movielens-1m"))
    layout = next((layout for layout in layouts if file.name.startswith(layout.ratings)), None)
    if layout is None:
        return _from_grouped(name, source, file, folder)
    return _from_ratings(name, source, file, layout, folder)


def _movies(source: Source, layout: Layout) -> np.ndarray:
    """Movie ids, int64 ascending. DataError naming file and line."""
    file, ids = source.require(layout.movies), []
    if layout.header:
        header_of(file, layout.separator, {"item": layout.header})
    lines = (line for text in text_blocks(file, header=bool(layout.header)) for line in text.split(b"\n")[:-1])
    for number, line in enumerate(lines, start=1 + bool(layout.header)):
        field, separator, _ = line.partition(layout.separator.encode())
        if not separator:
            raise DataError(f"{file}, line {number}: {shown(line)} has no {layout.separator!r}")
        if problem := _ID.problem(field):
            raise DataError(f"{file}, line {number}: item id {problem}")
        ids.append(int(field))
    if not ids:
        raise DataError(f"{file}: has no items")
    movies, lines_of_each = np.unique(np.array(ids, dtype=np.int64), return_counts=True)
    if (twice := lines_of_each > 1).any():
        raise DataError(f"{file}: item {movies[twice][0]} has {lines_of_each[twice][0]} lines; wanted one")
    require_dense(file, "item id", int(movies[-1]), len(movies))
    return movies


def _from_ratings(name: str, source: Source, file: SourceFile, layout: Layout, folder: Path) -> DataSchema:
    movies = _movies(source, layout)
    events = layout.lines.read(file)
    unknown = ~np.isin(events["item"], movies)
    if unknown.any():
        first = int(unknown.argmax())
        line = first + 1 + (layout.lines.header is not None)
        raise DataError(f"{file}, line {line}: item {events['item'][first]} is not in the list of items")
    require_dense(file, "user id", int(events["user"].max()), len(events["user"]))
    grouped, stated = group_users(file, events["user"], events["item"], events["time"], events["rating"])
    users, columns = _with_actions(grouped)
    return write_folder(
        folder,
        users,
        corpus=movies,
        name=name,
        order=STABLE_ORDER.format(file=file.name),
        source=stated,
        columns=columns,
    )


def _with_actions(users: Users) -> tuple[Users, HistoryColumns]:
    """Stars as actions, rating_ge_2 to rating_ge_5, and the user id as a contextual feature."""
    assert users.ratings is not None, "all layouts of ratings have them"
    bits = [(users.ratings >= stars).astype(np.int32) << bit for bit, stars in enumerate(_STARS)]
    columns = HistoryColumns(
        timestamps=True,
        ratings=True,
        actions=[f"rating_ge_{stars}" for stars in _STARS],
        contextual={"user": int(users.user_ids.max()) + 1},
    )
    return replace(users, columns={"actions": np.bitwise_or.reduce(bits), "user": users.user_ids}), columns


def _from_grouped(name: str, source: Source, file: SourceFile, folder: Path) -> DataSchema:
    """One row a user, already in order, without times: columns user_id and item_ids."""
    movies = _movies(source, _LAYOUTS[name][0])
    with file.open() as stream:
        table = pq.read_table(stream, columns=["user_id", "item_ids"], page_checksum_verification=True)
        user_ids = table.column("user_id").cast(pa.int64())
        lists = table.column("item_ids").cast(pa.list_(pa.int64())).combine_chunks()
    if lists.null_count or lists.flatten().null_count or user_ids.null_count:
        raise DataError(f"{file}: column user_id or item_ids has nulls")
    items, offsets = lists.flatten().to_numpy(), np.append(0, np.cumsum(lists.value_lengths().to_numpy()))
    unknown = ~np.isin(items, movies)
    if unknown.any():
        first = int(unknown.argmax())
        row = int(np.searchsorted(offsets, first, side="right") - 1)
        raise DataError(f"{file}: row {row}: item {items[first]} is not in the list of movies")
    if len(np.unique(user_ids.to_numpy())) != len(user_ids):
        raise DataError(f"{file}: column user_id has a user twice")
    stated = (table.schema.metadata or {}).get(b"order", b"as in the file").decode()
    return write_folder(
        folder,
        Users(user_ids.to_numpy(), offsets, items),
        corpus=movies,
        name=name,
        order=f"as given, not sorted here; the file says: {stated}",
        source=str(file),
    )
