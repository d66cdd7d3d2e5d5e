"""Rows drawn from a tabular folder, in any number: traffic of the real skew, for speed, caches and plans.

The profile is the first rows of the folder, at most `profile_rows`. Rows are drawn from it in two ways:

block = 1   A row has the label, the dense values and the missing ids of one row of the profile, drawn uniformly:
            columns that are missing together stay so. Each other id is that of its column in another row, drawn
            uniformly among those that have one: the skew of every column stays, what occurs together and when is lost.
block > 1   Runs of so many rows of the profile in their order, from uniform starts: what occurs together stays, and so
            does how soon an id comes again, within a run.

Row n depends on the profile, the seed and block (and numpy's sampling methods, which a new numpy may change). Memory:
the profile, 160 bytes a row of Criteo's columns. Where block = 1 the ids say nothing of the label: train on `gr prepare
clicks` to see a model learn.

B rows of a chunk, P of the profile, H ids of a row over all columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from gr.data.tabular import TabularDataset, TabularRows
from gr.errors import ConfigError
from gr.prepare.generate import random_stream, require_at_least, size
from gr.prepare.tabular import ROWS_PER_GROUP, column_names, tabular_table, write_tabular
from gr.schema import SourceRows, TabularSchema


@dataclass(frozen=True)
class TraceOptions:
    """Size of the folder; for block see the module. Raises ConfigError for numbers below 1, and a seed below 0."""

    rows: int = size(1_000_000, "Rows to write.")
    block: int = size(1, "Rows drawn together, in the source's order.")
    profile_rows: int = size(1_000_000, "First rows of the source to read.")
    seed: int = size(1)

    def __post_init__(self) -> None:
        require_at_least(self, {"rows": 1, "block": 1, "profile_rows": 1, "seed": 0})


class Trace:
    """The rows of one profile and one set of options; chunks can be drawn in any order."""

    def __init__(self, data: TabularDataset, options: TraceOptions) -> None:
        """Raises ConfigError for a profile shorter than a block."""
        self.options, self.schema, self.profile = options, data.schema, _profile(data, options.profile_rows)
        self.profile_rows = len(self.profile.labels_B)
        if self.profile_rows < options.block:
            raise ConfigError(
                f"block={options.block}: the profile has {self.profile_rows} rows; set block to so many or fewer"
            )
        ends = list(accumulate(column.hots for column in data.schema.sparse))
        self._columns = [slice(end - c.hots, end) for end, c in zip(ends, data.schema.sparse, strict=True)]
        self._present = [np.flatnonzero(self.profile.ids_BH[:, column].any(axis=1)) for column in self._columns]

    def chunks(self) -> Iterator[TabularRows]:
        """All rows in order, in chunks of at most ROWS_PER_GROUP."""
        for number, start in enumerate(range(0, self.options.rows, ROWS_PER_GROUP)):
            random = random_stream(self.options.seed, number)
            yield self._draw(random, min(ROWS_PER_GROUP, self.options.rows - start))

    def _draw(self, random: np.random.Generator, count: int) -> TabularRows:
        block = self.options.block
        starts = random.integers(0, self.profile_rows - block + 1, -(-count // block))
        row_B = (starts[:, None] + np.arange(block)).ravel()[:count]
        profile = self.profile
        ids_BH = profile.ids_BH[row_B]
        if block == 1:
            for column, present in zip(self._columns, self._present, strict=True):
                drawn = np.flatnonzero(ids_BH[:, column].any(axis=1))
                if len(drawn):
                    others = present[random.integers(0, len(present), len(drawn))]
                    ids_BH[drawn, column] = profile.ids_BH[others, column]
        return TabularRows(profile.labels_B[row_B], profile.dense_BN[row_B], ids_BH)

    def table(self, rows: TabularRows) -> pa.Table:
        """Rows as a table of the folder's columns."""
        ids = [rows.ids_BH[:, column] for column in self._columns]
        return tabular_table(column_names(self.schema), rows.labels_B, rows.dense_BN.T, ids)


def write_trace(source: Path, folder: Path, options: TraceOptions) -> TabularSchema:
    """Write options.rows rows drawn from the tabular folder `source` into an empty folder.

    Raises ConfigError as Trace does, DataError for bad rows of the source.
    """
    trace = Trace(TabularDataset.open(source), options)
    name = f"{trace.schema.name}-trace"
    origin = f"gr prepare trace --seed {options.seed} --block {options.block}, {trace.profile_rows} rows of {source}"
    files = [SourceRows(name=name, rows=options.rows, minimum=0)]
    changes = {"name": name, "rows": options.rows, "files": files, "source": origin}
    schema = trace.schema.model_copy(update=changes | {"bad_rows": {}, "negative_counts": {}})
    write_tabular(folder, schema, map(trace.table, trace.chunks()), "trace")
    return schema


def _profile(data: TabularDataset, limit: int) -> TabularRows:
    groups, rows = [], 0
    for index, count in enumerate(data.row_counts):
        groups.append(data.read_row_group(index))
        rows += count
        if rows >= limit:
            break
    whole = [np.concatenate([getattr(group, name) for group in groups]) for name in ("labels_B", "dense_BN", "ids_BH")]
    return TabularRows(*(array[:limit] for array in whole))
