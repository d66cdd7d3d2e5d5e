"""Passes over the rows of a tabular folder. B rows of a batch on this rank."""

from collections.abc import Sequence

import numpy as np

from gr.batch import TabularBatch
from gr.data.collate import Counts
from gr.data.collate_tabular import batch_of_places
from gr.data.loader import Places, ResumableSource, checksums, rank_batch_size
from gr.data.order import TrainingOrder
from gr.data.tabular import TabularColumns, TabularDataset
from gr.errors import ConfigError
from gr.logging import get_logger, log_once

log = get_logger(__name__)


class TabularPass(ResumableSource[TabularColumns, TabularBatch]):
    """Rows [b*G, (b+1)*G) of a pass, in file order, of which rank r takes the r-th of world_size equal slices.

    The cursor is the step: batches before this one.
    """

    order_name = "pass over the data"
    identity_keys = "data folder, rows, batch size and seed"
    read_threads = capacity = prefetch = 2

    def __init__(
        self,
        dataset: TabularDataset,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        shuffle_seed: int | None = None,
        rows: slice | None = None,
        drop_last: bool = True,
        epochs: int = 1,
    ) -> None:
        """global_batch_size: G, rows a step over all ranks. shuffle_seed: instead of file order, row groups in a random
        order and the rows of each in a random order, another one in each epoch; the same at any world size. rows: part
        of the data to go over. drop_last: leave out the last G' < G rows of each epoch; otherwise they are shared as
        evenly as ranks allow, which may leave a rank with a batch of no rows. epochs: passes over the rows.

        Raises ConfigError if the world size does not divide G, there is no whole batch, or `rows` is outside the data.
        """
        rank_batch_size("global_batch_size", global_batch_size, world_size)
        self._dataset, self._size, self._rank, self._world_size = dataset, global_batch_size, rank, world_size
        rows = rows or slice(None)
        first_row, stop_row = rows.start or 0, dataset.rows if rows.stop is None else rows.stop
        if rows.step not in (None, 1) or not 0 <= first_row < stop_row <= dataset.rows:
            raise ConfigError(
                f"rows {rows} are no part of the {dataset.rows} rows of the data; give slice(start, stop) within them"
            )
        start_G = np.cumsum([0, *dataset.row_counts])
        self._groups = np.flatnonzero((start_G[:-1] < stop_row) & (start_G[1:] > first_row))
        self._skipped = np.maximum(first_row - start_G[self._groups], 0)  # rows of each group before the first
        counts = np.minimum(stop_row, start_G[self._groups + 1]) - start_G[self._groups] - self._skipped
        self._order = TrainingOrder(counts, lanes=1, seed=shuffle_seed or 0, shuffle=shuffle_seed is not None)
        batches, rest = divmod(self._order.rows, global_batch_size)
        self._batches = batches if drop_last or not rest else batches + 1
        self.stop = epochs * self._batches
        self._dropped = rest if drop_last else 0
        if not self.stop:
            raise ConfigError(
                f"{dataset.path}: {rest} rows do not fill one batch of {global_batch_size}; set a smaller batch size, "
                "or drop_last=False"
            )
        if self._dropped:
            log_once(log, f"{dataset.path}: the last {rest} rows do not fill a batch of {global_batch_size}: left out")
        self.identity = {
            "first_row": first_row,
            "stop_row": stop_row,
            "global_batch_size": global_batch_size,
            "shuffle_seed": shuffle_seed,
            **checksums(dataset.row_counts, dataset.schema),
        }

    def read(self, row_group: int) -> TabularColumns:
        return self._dataset.read_row_group(row_group)

    def steps(self, epochs: int) -> int:
        return epochs * self._batches

    def rows(self, cursor: int) -> Places:
        epoch, batch = divmod(cursor, self._batches)
        size = min(self._size, self._order.rows - batch * self._size)
        first = epoch * self._order.rows + batch * self._size
        start, stop = (first + r * size // self._world_size for r in (self._rank, self._rank + 1))
        index_B, row_B = self._order.locate(self._order.lane_rows(0, start, stop - start))
        return self._groups[index_B], self._skipped[index_B] + row_B

    def collate(self, cursor: int, groups: Sequence[TabularColumns], places: Places) -> tuple[TabularBatch, Counts]:
        return batch_of_places(groups, places, self._dataset.schema, cursor * self._size), Counts()

    def counters(self, counts: Counts) -> dict[str, int]:
        """Rows of an epoch that no rank gives: those after the last whole batch."""
        return {"dropped_examples": self._dropped}
