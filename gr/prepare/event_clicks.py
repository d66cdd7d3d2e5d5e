"""A log with labels -> a tabular folder for a click model: a row for each event, by time."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from gr.errors import DataError
from gr.prepare.event_codes import Given
from gr.prepare.event_log import one
from gr.prepare.event_table import Log, save_vocabularies, train_ids
from gr.prepare.tabular import tabular_table, write_tabular
from gr.schema import DenseTransform, SourceRows, SparseColumn, TabularSchema

_LARGEST_TABLE = 2**31 - 1  # ids are int32


def write_clicks(log: Log, folder: Path, where: str, vocabularies: Given | None) -> TabularSchema:
    """Sparse columns: item, user and every category; dense ones: every number. Labels are those of --label."""
    options, ids_I, ids_U = log.options, train_ids(log, "item"), train_ids(log, "user")
    (user_sizes, user_numbers), (item_sizes, item_numbers) = log.user_features.sizes(), log.item_features.sizes()
    sizes = {options.item: int(ids_I.max()) + 1, options.user: int(ids_U.max()) + 1}
    sizes |= {name: codes.count + 1 for name, codes in log.features.items()} | user_sizes | item_sizes
    if (largest := max(sizes, key=lambda name: sizes[name])) and sizes[largest] > _LARGEST_TABLE:
        raise DataError(
            f"column {largest}: has {sizes[largest]:,} values, a click model takes {_LARGEST_TABLE:,} at most"
        )
    dense = [*options.values, *user_numbers, *item_numbers]
    assert options.label is not None
    rows = one(log.con, f"SELECT count(*) FROM events WHERE {where}")
    if not rows:
        raise DataError(f"{folder.name}: no event is left to write; choose another split")
    folder.mkdir(parents=True, exist_ok=True)
    schema = TabularSchema(
        format_version=1,
        kind="tabular",
        name=options.name,
        labels=[options.label],
        dense=dense,
        transform=DenseTransform(name="none", version=1),
        sparse=[SparseColumn(name=name, cardinality=size) for name, size in sizes.items()],
        rows=rows,
        threshold=1,
        files=[SourceRows(name=log.source, rows=rows, minimum=0)],
        vocabularies=save_vocabularies(
            log, folder, {options.item: ("item", ids_I), options.user: ("user", ids_U)}, vocabularies
        ),
        source=f"{log.source}: {'; '.join(log.notes)}",
    )
    names = [options.label, *dense, *sizes]
    order = "time, place" if options.time else "place"
    blocks = log.con.sql(f"SELECT * FROM events WHERE {where} ORDER BY {order}").to_arrow_reader(1 << 17)
    write_tabular(folder, schema, (_rows(log, names, ids_I, ids_U, block) for block in blocks), folder.name)
    return schema


def _rows(log: Log, names: list[str], ids_I: np.ndarray, ids_U: np.ndarray, block: pa.RecordBatch) -> pa.Table:
    """A block of events as a table of label, dense features and ids."""
    options = log.options
    column = {name: block.column(name).to_numpy(zero_copy_only=False) for name in block.schema.names}
    user_B, item_B = column["user"], column["item"]
    values = {name: column[f"value_{place}"] for place, name in enumerate(options.values)}
    ids = {name: column[f"feature_{place}"] for place, name in enumerate(options.features)}
    features = {name: array[user_B] for name, array in log.user_features.by_code.items()}
    features |= {name: array[item_B] for name, array in log.item_features.by_code.items()}
    everything = {**values, **ids, **features, options.item: ids_I[item_B], options.user: ids_U[user_B]}
    everything = {name: everything[name] for name in names[1:]}
    dense = [array.astype(np.float32) for array in everything.values() if array.dtype.kind == "f"]
    sparse = [array.astype(np.int32) for array in everything.values() if array.dtype.kind != "f"]
    return tabular_table(names, column["label"].astype(np.int8), dense, sparse)
