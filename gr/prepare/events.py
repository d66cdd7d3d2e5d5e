"""`gr prepare events`: anyone's interaction log -> a data folder, with the vocabularies of its ids.

log (columns as read) -> codes (an id for each value) -> events (ids and times; without duplicates and what the filters
leave out) -> a folder of histories, or of rows for a click model.

B users, T events, I items.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from pydantic import ValidationError
from tqdm import tqdm

from gr.errors import DataError
from gr.prepare.event_clicks import write_clicks
from gr.prepare.event_codes import Given
from gr.prepare.event_log import database, one
from gr.prepare.event_options import EventOptions
from gr.prepare.event_rows import BLOCK
from gr.prepare.event_table import (
    ITEM,
    Log,
    encode,
    leave_out_rare,
    save_users,
    save_vocabularies,
    train_ids,
)
from gr.prepare.write import FolderWriter, Users, plain_block
from gr.schema import DataSchema, HistoryColumns, TabularSchema


@dataclass(frozen=True)
class Prepared:
    """The folders that were written, by name ("" where there is one), and what to tell of the log, a line each."""

    schemas: dict[str, DataSchema | TabularSchema]
    notes: list[str]


def prepare_events(source: Any, folder: Path, options: EventOptions) -> Prepared:
    """Writes a folder, or train/ and test/ in it, of a log. source: files, patterns, or a table in memory.

    Raises DataError, in one line, for columns and values that are not what the options say.
    """
    if options.test_from is not None and options.test_users is not None:
        raise DataError("--test-from and --test-users are two ways to split; choose one")
    schemas: dict[str, DataSchema | TabularSchema] = {}
    with database(options.memory, folder.parent) as con:
        log = encode(con, source, options)
        leave_out_rare(log)
        write = write_clicks if options.label else _write_histories
        given = log.given
        for name, where in log.splits.items():
            schemas[name] = schema = write(log, folder / name, where, given)
            given = Given(folder / name, schema)
    return Prepared(schemas, log.notes)


def _write_histories(log: Log, folder: Path, where: str, vocabularies: Given | None) -> DataSchema:
    con, options = log.con, log.options
    ids_I = train_ids(log, "item")
    contextual, numeric = log.user_features.sizes()
    item_categories, item_numbers = log.item_features.sizes()
    try:
        columns = HistoryColumns(
            timestamps=options.time is not None,
            time_unit=log.time_unit,
            ratings=options.rating is not None,
            actions=list(log.actions),
            values=[*options.values, *item_numbers],
            event_features={name: codes.count + 1 for name, codes in log.features.items()} | item_categories,
            contextual=contextual,
            contextual_numeric=numeric,
        )
    except ValidationError as error:
        raise DataError(f"columns of the folder: {error.errors()[0]['msg']}; rename the column") from None
    writer = FolderWriter(folder, columns, item_cardinality=int(ids_I.max()) + 1)
    query = f"SELECT * FROM events WHERE {where}"
    if len(log.splits) > 1:  # of a filter that is a join, DuckDB promises no order
        query += " ORDER BY rowid"
    total = one(con, f"SELECT count(*) FROM events WHERE {where}")
    with tqdm(total=total, unit="event", unit_scale=True, desc=folder.name, disable=None) as bar:
        for table in _whole_users(con.sql(query)):
            bar.update(len(table["user"]))
            users = _users(log, table, ids_I)
            if len(users.user_ids):
                writer.write(users)
    return writer.close(
        name=options.name,
        order="by time within each user; ties in the order of the log" if options.time else "of the log",
        source=f"{log.source}: {'; '.join(log.notes)}",
        corpus=ids_I[ids_I > 0],
        vocabularies=save_vocabularies(log, folder, {ITEM: ("item", ids_I)}, vocabularies)
        | save_users(log, folder, where),
        item_features={name: _by_item(log.item_features.by_code[name], ids_I) for name in item_categories},
    )


def _by_item(values_I: np.ndarray, ids_I: np.ndarray) -> np.ndarray:
    """Values by item id, of values by code; 0 for ids that no item has."""
    values_E = np.zeros(int(ids_I.max()) + 1, dtype=values_I.dtype)
    values_E[ids_I[ids_I > 0]] = values_I[ids_I > 0]
    return values_E


def _users(log: Log, table: dict[str, np.ndarray], ids_I: np.ndarray) -> Users:
    """Whole users with their features, without events of items that have no id."""
    options = log.options
    id_T = ids_I.take(table["item"])
    if not (known_T := id_T > 0).all():
        id_T, table = id_T[known_T], {name: values[known_T] for name, values in table.items()}
    user_T, code_T = table["user"], table["item"]
    starts = np.flatnonzero(np.diff(user_T, prepend=-1))
    users_B = user_T[starts].astype(np.int64)
    columns = {name: table[f"value_{i}"] for i, name in enumerate(options.values)}
    columns |= {name: table[f"feature_{i}"] for i, name in enumerate(options.features)}
    if log.actions:
        columns["actions"] = table["actions"]
    columns |= {name: values.take(code_T) for name, values in log.item_features.by_code.items()}
    columns |= {name: values.take(users_B) for name, values in log.user_features.by_code.items()}
    return Users(
        user_ids=users_B,
        offsets=np.append(starts, len(user_T)).astype(np.int64),
        item_ids=id_T,
        timestamps=table.get("time"),
        ratings=table.get("rating"),
        columns=columns,
    )


def _whole_users(events: duckdb.DuckDBPyRelation) -> Iterator[dict[str, np.ndarray]]:
    """The rows in blocks that end with a user."""
    rest: dict[str, np.ndarray] = {}
    for batch in filter(len, events.to_arrow_reader(BLOCK)):
        block = plain_block(batch)
        if rest:
            block = {name: np.concatenate([rest[name], values]) for name, values in block.items()}
        user_T = block["user"]
        cut = int(np.searchsorted(user_T, user_T[-1]))
        if cut:
            yield {name: values[:cut] for name, values in block.items()}
        rest = {name: values[cut:] for name, values in block.items()}
    if rest:
        yield rest
