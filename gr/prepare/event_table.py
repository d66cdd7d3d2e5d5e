"""An interaction log with ids for its values: the table `events` in DuckDB, and what belongs to it.

I items.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa

from gr.errors import DataError
from gr.prepare.event_codes import Codes, Given, by_code, column_of_values, counted, make_codes, save_vocabulary
from gr.prepare.event_features import Features, join_features, number_expression
from gr.prepare.event_log import (
    Column,
    folder_of,
    literal,
    load_log,
    one,
    row,
    time_expression,
)
from gr.prepare.event_options import EventOptions, check_names, moment, other_columns
from gr.prepare.event_rows import BLOCK, CodedRows, RowChoice, code_rows, sorted_rows
from gr.prepare.write import plain_array, plain_table, plain_values
from gr.schema import MAX_ACTIONS, USER_COLUMN, DataSchema, TabularSchema

ITEM = "item_id"


@dataclass(frozen=True)
class Log:
    """An encoded log: table `events` of user, item, time and further columns in DuckDB, by user, time and place in the
    log, which is a column too where there is a label.
    """

    con: duckdb.DuckDBPyConnection
    options: EventOptions
    users: Codes
    items: Codes
    time_unit: Literal["s", "ms"]
    actions: tuple[str, ...]
    features: dict[str, Codes]  # of events
    user_features: Features
    item_features: Features
    splits: dict[str, str]
    given: Given | None
    source: str
    notes: list[str]
    _counts: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def occurrences(self, column: str, where: str) -> np.ndarray:
        """The events of each id of users, items or a feature, int64 [ids + 1], after all filters."""
        if (column, where) not in self._counts:
            codes = {"user": self.users, "item": self.items}
            codes |= {f"feature_{place}": each for place, each in enumerate(self.features.values())}
            count_V = self._counts[column, where] = np.zeros(codes[column].count + 1, dtype=np.int64)
            for batch in self.con.sql(f"SELECT {column} FROM events WHERE {where}").to_arrow_reader(BLOCK):
                np.add.at(count_V, plain_values(batch.column(0)), 1)
        return self._counts[column, where]

    @property
    def train(self) -> str:
        """The events whose users and items have ids."""
        return self.splits.get("train", "true")


def encode(con: duckdb.DuckDBPyConnection, source: Any, options: EventOptions) -> Log:
    """Reads the source and makes the table `events` of it."""
    columns, given = options.columns(), _given(options)
    other = {"user": other_columns(options.user_features, options.user)}
    other["item"] = other_columns(options.item_features, options.item)
    check_names(options, [*options.values, *options.features, *other["user"], *other["item"]])
    types = load_log(con, source, columns)
    total = one(con, "SELECT count(*) FROM log")
    if not total:
        raise DataError(f"{_described(source)}: has no rows")
    notes = [f"{total:,} events read"]
    total -= _leave_out_missing(con, columns, options.on_bad_row, notes)
    files = _vocabulary_files(options, given)
    chosen, unit = _expressions(con, types, options, notes)
    actions, chosen_actions = _actions(con, options)
    coded = {
        name: column_of_values(con, name, types[name], f"column {columns[name]}")
        for name in columns
        if name in ("user", "item") or name.startswith("feature_")
    }
    chosen = {name: sql for name, (sql, _) in coded.items()} | chosen | chosen_actions
    if options.label:
        chosen["place"] = "place"
    if (between := _between(options, chosen.get("time"), unit)) is not None:
        chosen["inside"] = f"coalesce(({between})::TINYINT, 0)"
    with tempfile.TemporaryDirectory(dir=folder_of(con)) as folder:
        rows = code_rows(con, chosen, list(coded), Path(folder))
        codes = {
            name: _codes(con, rows, name, (f"column {columns[name]}", kind), files.get(name))
            for name, (_, kind) in coded.items()
        }
        users, items = codes.pop("user"), codes.pop("item")
        features = dict(zip(options.features, codes.values(), strict=True))
        _create_events(con, rows, options, given)
    _leave_out_repeats(con, options, total, notes)
    con.execute("DROP VIEW log; DROP VIEW IF EXISTS whole_log; DROP TABLE IF EXISTS log_rows")
    return Log(
        con,
        options,
        users,
        items,
        unit,
        actions,
        features,
        join_features(con, "user", users, options.user_features, (options.user, other["user"]), given, notes),
        join_features(con, "item", items, options.item_features, (options.item, other["item"]), given, notes),
        _splits(options, users, unit),
        given,
        _described(source),
        notes,
    )


def _expressions(
    con: duckdb.DuckDBPyConnection, types: dict[str, Column], options: EventOptions, notes: list[str]
) -> tuple[dict[str, str], Literal["s", "ms"]]:
    """SQL of the columns of `events`, by name, but for actions and features; and the unit of its times."""
    chosen: dict[str, str] = {}
    columns = options.columns()
    unit: Literal["s", "ms"] = "s"
    if options.time is not None:
        chosen["time"], unit, phrase = time_expression(con, types["time"], options.time_unit, f"column {options.time}")
        notes.append(f"times: {phrase}")
    for name in columns:
        if name == "rating" or name.startswith("value_"):
            chosen[name] = number_expression(con, name, types[name], f"column {columns[name]}")
    if "label" in columns:
        chosen["label"] = _flag(con, "label", columns["label"])
    return chosen, unit


def _given(options: EventOptions) -> Given | None:
    """The vocabularies of --vocabulary, a folder of the kind that is to be written."""
    if options.vocabulary is None:
        return None
    schema = (TabularSchema if options.label else DataSchema).load(options.vocabulary)
    return Given(options.vocabulary, schema)


def _vocabulary_files(options: EventOptions, given: Given | None) -> dict[str, Path]:
    """The files of --vocabulary by the column whose ids they have.

    Users of histories are no input of a model, so that they need not be known.
    """
    if given is None:
        return {}
    names = {f"feature_{place}": name for place, name in enumerate(options.features)}
    names |= {"item": ITEM} if options.label is None else {"user": options.user, "item": options.item}
    return {column: given.file(name) for column, name in names.items()}


def _codes(
    con: duckdb.DuckDBPyConnection, rows: CodedRows, column: str, described: tuple[str, Column], given: Path | None
) -> Codes:
    """The ids of users, items or a feature of events, as table codes_<column>, which has the code of each value too.

    described: the column's title and type. given: a vocabulary whose ids are used.
    """
    title, kind = described
    values = rows.codes[column].values()
    code_V = plain_array(np.arange(len(values), dtype=np.int32))
    con.register("values_of_codes", pa.Table.from_arrays([values, code_V], names=["raw", "code"]))
    codes = make_codes(con, f"codes_{column}", "values_of_codes", kind, title, given)
    con.unregister("values_of_codes")
    return codes


def _create_events(con: duckdb.DuckDBPyConnection, rows: CodedRows, options: EventOptions, given: Given | None) -> None:
    """Makes the table `events` of the rows."""
    ids = {}
    for column, codes in rows.codes.items():
        query = f"SELECT code, id::INTEGER FROM codes_{column}"
        ids[column] = by_code(con, query, len(codes) + 1)
    # A row for a click model stays where its user or item is not known: they have id 0. Two that are not known are not
    # the same one, so repeats of them are told by their codes.
    unknown = ["user", "item"] if options.label else []
    choice = RowChoice(ids, [] if unknown else ["user", "item"], unknown if given is not None else [])
    con.register("sorted_rows", sorted_rows(rows, choice))
    con.execute("CREATE TEMP TABLE events AS SELECT * FROM sorted_rows")  # which has no journal
    con.unregister("sorted_rows")


def _leave_out_repeats(con: duckdb.DuckDBPyConnection, options: EventOptions, total: int, notes: list[str]) -> None:
    """Repeats, where they are joined; notes what is left of `total` events, and what of it is not known."""
    kept = one(con, "SELECT count(*) FROM events")
    if kept < total:
        reasons = {
            "outside --since and --until": options.since is not None or options.until is not None,
            "of items that --vocabulary lacks": options.vocabulary is not None,
        }
        why = ", or ".join(name for name, given in reasons.items() if given)
        notes.append(f"{total - kept:,} events left out: {why}")
    if options.joins_repeats:
        _join_repeats(con, options, notes)
    for column in ("raw_user", "raw_item"):
        con.execute(f"ALTER TABLE events DROP COLUMN IF EXISTS {column}")
    for key in ("user", "item"):
        if unknown := one(con, f"SELECT count(*) FROM events WHERE {key} = 0"):
            notes.append(f"{unknown:,} events of {key}s that are not known have id 0")


def _join_repeats(con: duckdb.DuckDBPyConnection, options: EventOptions, notes: list[str]) -> None:
    """Leaves the first of the events that are the same in all columns but actions, with the actions of all of them.

    Only events of the same user and time can be, and these stand side by side in `events`.
    """
    but = "place, " if options.label else ""
    con.execute(
        f"CREATE TABLE tied AS SELECT * EXCLUDE ({but}older_user, older_time, newer_user, newer_time) FROM "
        "(SELECT *, rowid AS row, lag(user) OVER () AS older_user, lag(time) OVER () AS older_time, "
        "lead(user) OVER () AS newer_user, lead(time) OVER () AS newer_time FROM events) "
        "WHERE (user = older_user AND time = older_time) OR (user = newer_user AND time = newer_time)"
    )
    but, merged = ("row, actions", ", bit_or(actions) AS actions") if options.actions else ("row", "")
    con.execute(
        f"CREATE TABLE first AS SELECT * EXCLUDE ({but}), min(row) AS row{merged}, count(*) AS copies FROM tied "
        "GROUP BY ALL"
    )
    con.execute("DELETE FROM events WHERE rowid IN (SELECT row FROM tied ANTI JOIN first USING (row))")
    if options.actions:
        con.execute("UPDATE events SET actions = f.actions FROM first f WHERE events.rowid = f.row AND f.copies > 1")
    if repeats := one(con, "SELECT (SELECT count(*) FROM tied) - (SELECT count(*) FROM first)"):
        notes.append(f"{repeats:,} repeated events joined (the same user, item, time and values)")
    con.execute("DROP TABLE tied; DROP TABLE first")


def _leave_out_missing(
    con: duckdb.DuckDBPyConnection, columns: dict[str, str], on_bad_row: str, notes: list[str]
) -> int:
    """How many events lack what every event has, which the view `log` is then without."""
    needed = [name for name in columns if name in ("user", "item", "time", "label")]
    missing = " OR ".join(f"{name} IS NULL" for name in needed)
    count, first = row(con, f"SELECT count(*), min(place) FROM log WHERE {missing}")
    if not count:
        return 0
    if on_bad_row == "fail":
        values = row(con, f"SELECT {', '.join(needed)} FROM log WHERE place = {first}")
        column = next(columns[name] for name, value in zip(needed, values, strict=True) if value is None)
        raise DataError(
            f"row {first} of the log, column {column}: is missing, as in {count:,} rows; correct them, or leave them "
            "out with --on-bad-row skip"
        )
    con.execute(f"ALTER VIEW log RENAME TO whole_log; CREATE VIEW log AS SELECT * FROM whole_log WHERE NOT ({missing})")
    notes.append(f"{count:,} events left out: {', '.join(columns[name] for name in needed)} missing")
    return int(count)


def _actions(con: duckdb.DuckDBPyConnection, options: EventOptions) -> tuple[tuple[str, ...], dict[str, str]]:
    """The names of the bits of the column actions, and its SQL; none without actions."""
    names = options.actions
    if not names:
        return (), {}
    distinct = [row[0] for row in con.execute("SELECT DISTINCT action_0::VARCHAR FROM log LIMIT 1000").fetchall()]
    if len(names) > 1 or one(con, _odd_flag("action_0")) is None:
        bits = [f"({_flag(con, f'action_{i}', n)} << {i})" for i, n in enumerate(names)]
        return names, {"actions": " | ".join(bits)}
    if None in distinct or len(distinct) > MAX_ACTIONS:
        fault = (
            "has missing values"
            if None in distinct
            else f"has {len(distinct):,} different values, at most {MAX_ACTIONS} are actions"
        )
        raise DataError(f"column {names[0]}: {fault}; name columns that are 0 or 1, or a column of few actions")
    values = sorted(distinct)
    cases = " ".join(f"WHEN {literal(value)} THEN {1 << bit}" for bit, value in enumerate(values))
    return tuple(values), {"actions": f"CASE action_0::VARCHAR {cases} END"}


def _flag(con: duckdb.DuckDBPyConnection, name: str, title: str) -> str:
    """SQL of a column of 0 and 1, or false and true; missing is 0. Raises DataError for anything else."""
    if (bad := one(con, _odd_flag(name))) is not None:
        raise DataError(f"column {title}: {bad} is neither 0 nor 1")
    return f"coalesce({_number_of_flag(name)}::INT, 0)"


def _odd_flag(name: str) -> str:
    """SQL of a value that is neither 0 nor 1; null where there is none."""
    return (
        f"SELECT any_value({name}::VARCHAR) FROM log "
        f"WHERE {name} IS NOT NULL AND coalesce({_number_of_flag(name)} NOT IN (0, 1), true)"
    )


def _number_of_flag(name: str) -> str:
    text = f"{name}::VARCHAR"
    return f"coalesce(TRY_CAST({text} AS DOUBLE), TRY_CAST({text} AS BOOLEAN)::INT)"


def _between(options: EventOptions, time: str | None, unit: str) -> str | None:
    """SQL of the rows of --since and --until; None for all."""
    bounds = [(">=", options.since, "--since"), ("<", options.until, "--until")]
    conditions = [f"{time} {sign} {moment(date, unit, flag)}" for sign, date, flag in bounds if date is not None]
    if conditions and time is None:
        raise DataError("--since and --until need --time")
    return " AND ".join(conditions) or None


def leave_out_rare(log: Log) -> None:
    """Leaves out users and items with few events, until all that stay have enough (a k-core)."""
    con, least = log.con, {"user": log.options.min_user_events, "item": log.options.min_item_events}
    before = total = one(con, "SELECT count(*) FROM events")
    while any(k > 1 for k in least.values()):
        for key, k in least.items():
            few = f"SELECT {key} FROM events GROUP BY {key} HAVING count(*) < {k}"
            con.execute(f"DELETE FROM events WHERE {key} IN ({few})")
        left = one(con, "SELECT count(*) FROM events")
        if left == total:
            break
        total = left
    if total < before:
        log.notes.append(f"{before - total:,} events left out: of users or items with too few events")
    if not total:
        raise DataError("no event is left; relax the filters")
    if not log.options.label and (alone := int((log.occurrences("user", "true") == 1).sum())):
        log.notes.append(f"{alone:,} users have one event: there is nothing to predict it from")
    for name, where in log.splits.items():
        if not one(con, f"SELECT count(*) FROM events WHERE {where}"):
            raise DataError(f"{name}/ would have no event; choose another --test-from or --test-users")
    if test := log.splits.get("test"):
        unseen = f"{test} AND item NOT IN (SELECT item FROM events WHERE {log.train})"
        if count := one(con, f"SELECT count(*) FROM events WHERE {unseen}"):
            what = "have id 0" if log.options.label else "are left out"
            log.notes.append(f"test: {count:,} events of items that train/ lacks {what}")


def _splits(options: EventOptions, users: Codes, unit: str) -> dict[str, str]:
    """SQL conditions on `events` by folder. The items of train/ make the vocabulary."""
    if options.test_from is not None:
        if options.time is None:
            raise DataError("--test-from needs --time")
        start = moment(options.test_from, unit, "--test-from")
        later = f"time >= {start}"
        test = later if options.label else f"user IN (SELECT user FROM events WHERE {later})"
        return {"train": f"time < {start}", "test": test}
    if options.test_users is not None:
        drawn = f"md5_number_lower(value::VARCHAR) % 1000000 < {round(options.test_users * 1e6)}"
        chosen = f"user IN (SELECT id FROM {users.table} WHERE {drawn})"
        return {"train": f"NOT {chosen}", "test": chosen}
    return {"": "true"}


def train_ids(log: Log, key: Literal["user", "item"]) -> np.ndarray:
    """The id in the folders for each code of a user or item, int64 [codes + 1]: from 1 over those of train/, or as
    given by --vocabulary; 0 for all others.
    """
    codes = log.users if key == "user" else log.items
    if codes.fixed:
        return np.arange(codes.count + 1)
    trained = np.flatnonzero(log.occurrences(key, log.train))
    ids = np.zeros(codes.count + 1, dtype=np.int64)
    ids[trained] = np.arange(1, len(trained) + 1)
    return ids


def save_vocabularies(
    log: Log, folder: Path, ids: dict[str, tuple[Literal["user", "item"], np.ndarray]], given: Given | None
) -> dict[str, str]:
    """Writes the vocabularies of model inputs, and returns the digests of their files, by name.

    ids: by name, train_ids of users or items. given: those used instead.
    """
    con, queries = log.con, {}
    for name, (key, ids_V) in ids.items():
        chosen = {"code": np.flatnonzero(ids_V), "id": ids_V[ids_V > 0]}
        chosen["count"] = log.occurrences(key, log.train)[chosen["code"]]
        con.register(f"{key}_ids", plain_table(chosen))
        queries[name] = f"SELECT value, m.id, count FROM codes_{key} c JOIN {key}_ids m ON c.id = m.code ORDER BY m.id"
    for place, (name, codes) in enumerate(log.features.items()):
        queries[name] = counted(con, codes, log.occurrences(f"feature_{place}", log.train))
    for features in (log.user_features, log.item_features):
        queries |= features.vocabularies(con)
    return {name: save_vocabulary(con, folder, name, query, given) for name, query in queries.items()}


def save_users(log: Log, folder: Path, where: str) -> dict[str, str]:
    """Writes the vocabulary of the users of one folder of histories, where they are no input of a model."""
    query = counted(log.con, log.users, log.occurrences("user", where), least=1)
    return {USER_COLUMN: save_vocabulary(log.con, folder, USER_COLUMN, query, None)}


def _described(source: Any) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    return ", ".join(map(str, source)) if isinstance(source, Sequence) else f"a table of {type(source).__module__}"
