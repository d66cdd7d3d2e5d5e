"""MovieLens 100K, 1M and 20M (grouplens.org), as published, and two public regroupings of them.

No filtering and no new ids: an item id is the movie id, the corpus is the whole list of movies, rated or not.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.columns import ColumnType, read_column
from gr.errors import DataError
from gr.prepare.ratings import STABLE_ORDER, Format, group_users, read_ratings
from gr.prepare.source import Source, SourceFile
from gr.prepare.write import Users, write_folder
from gr.schema import DataSchema, HistoryColumns


@dataclass(frozen=True)
class Layout:
    """One published layout: file and format of the ratings, and of the list of movies, whose first field is the id."""

    ratings: str
    form: Format
    movies: str
    separator: str
    encoding: str = "latin-1"
    header: int = 0

    def movie_id(self, line: str) -> int:
        """ValueError on a malformed line."""
        if self.separator not in line:
            raise ValueError(f"{line!r} has no {self.separator!r}")
        return int(line.partition(self.separator)[0].strip('"'))


_U_DATA = Layout("u.data", Format("\t", 0, pa.int32()), "u.item", "|")
_RECBOLE = Layout("ml-100k.inter", Format("\t", 1, pa.int32()), "ml-100k.item", "\t", "utf-8", 1)
_LAYOUTS = {
    "movielens-100k": [_U_DATA, _RECBOLE],
    "movielens-1m": [Layout("ratings.dat", Format("::", 0, pa.int32()), "movies.dat", "::")],
    "movielens-20m": [Layout("ratings.csv", Format(",", 1, pa.int32()), "movies.csv", ",", "utf-8", 1)],
}
_GROUPED = "sequences.parquet"
_STARS = (2, 3, 4, 5)


def prepare_movielens(name: str, source: Source, folder: Path) -> DataSchema:
    """Write movielens-100k, movielens-1m or movielens-20m into an empty folder. DataError as in ratings.py."""
    for layout in _LAYOUTS[name]:
        ratings = source.find(layout.ratings)
        if ratings is not None:
            return _from_ratings(name, source, ratings, layout, folder)
    grouped = source.find(_GROUPED)
    if name == "movielens-1m" and grouped is not None:
        return _from_grouped(name, source, grouped, folder)
    files = " or ".join([layout.ratings for layout in _LAYOUTS[name]] + [_GROUPED] * (name == "movielens-1m"))
    raise DataError(f"{source.path}: has no {files}; give the unpacked folder or the zip archive of {name}")


def _movies(source: Source, layout: Layout) -> np.ndarray:
    """Movie ids, int64 ascending. DataError naming file and line."""
    file, ids = source.require(layout.movies), []
    with file.open() as stream:
        for number, line in enumerate(stream, start=1):
            if number <= layout.header:
                continue
            try:
                ids.append(layout.movie_id(line.decode(layout.encoding).rstrip("\r\n")))
                if ids[-1] < 1:
                    raise ValueError(f"item id {ids[-1]} is below 1")
            except ValueError as error:
                raise DataError(f"{file}, line {number}: {error}") from None
    if not ids:
        raise DataError(f"{file}: has no items")
    return np.unique(np.array(ids, dtype=np.int64))


def _from_ratings(name: str, source: Source, file: SourceFile, layout: Layout, folder: Path) -> DataSchema:
    movies = _movies(source, layout)
    events = read_ratings(file, layout.form)
    user_ids, items, times, ratings = (events.column(name).to_numpy() for name in ("user", "item", "time", "rating"))
    unknown = ~np.isin(items, movies)
    if unknown.any():
        first = int(unknown.argmax())
        raise DataError(
            f"{file}, line {first + 1 + layout.form.header}: item {items[first]} is not in the list of items"
        )
    users, columns = _with_actions(group_users(user_ids, items, times, ratings))
    return write_folder(
        folder,
        users,
        corpus=movies,
        name=name,
        order=STABLE_ORDER.format(file=file.name),
        source=str(file),
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
    try:
        with file.open() as stream:
            table = pq.read_table(stream, columns=["user_id", "item_ids"])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: is not a Parquet file with user_id and item_ids: {error}") from error
    wanted, stored = ColumnType("id", is_list=True), table.column("item_ids")
    if not wanted.reads(stored.type):
        raise DataError(f"{file}: column item_ids has type {stored.type}, wanted {wanted}")
    column = read_column(stored, wanted)
    if column.nulls.any() or column.values.null_count:
        raise DataError(f"{file}: column item_ids has nulls, or values that are no integers")
    items, offsets = column.values.to_numpy(), column.offsets
    assert offsets is not None, "a list column"
    unknown = ~np.isin(items, movies)
    if unknown.any():
        first = int(unknown.argmax())
        row = int(np.searchsorted(offsets, first, side="right") - 1)
        raise DataError(f"{file}: row {row}: item {items[first]} is not in the list of movies")
    stated = (table.schema.metadata or {}).get(b"order", b"as in the file").decode()
    users = Users(table.column("user_id").to_numpy(), offsets, items)
    return write_folder(
        folder,
        users,
        corpus=movies,
        name=name,
        order=f"as given, not sorted here; the file says: {stated}",
        source=str(file),
    )
