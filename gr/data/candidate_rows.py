"""Rows of a user and a candidate, in a log's own values -> batches for a ranking model. B rows, T events."""

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from gr.batch import ITEM_FEATURE, RankingBatch
from gr.data.collate import Rows
from gr.data.collate_ranking import RankingCollate
from gr.data.columns import PER_SECOND, ColumnType
from gr.data.dataset import Dataset, Histories
from gr.data.validate import LAST_SECOND, checked_column, require_columns
from gr.data.vocabulary import Vocabulary
from gr.errors import DataError
from gr.schema import USER_COLUMN

_GROUPS = 8  # row groups in memory
TIME = "timestamp"


class CandidateRows:
    """Makes batches of tables with columns user_id, item_id, perhaps timestamp, and the event features of the data.

    Each row is an example of its own: the user's whole history, and the candidate as its newest event, whose actions
    are to be predicted. Without a timestamp, or where it is null, a candidate comes at the time of the newest event.
    """

    def __init__(
        self, data: Dataset, collate: RankingCollate, users: Vocabulary, vocabularies: Mapping[str, Vocabulary]
    ) -> None:
        self.data, self.collate, self.users, self.vocabularies = data, collate, users, vocabularies
        self._user_ids = data.user_ids()
        self._order = np.argsort(self._user_ids, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(data.row_counts)])
        self._groups: OrderedDict[int, Histories] = OrderedDict()
        self.unknown_users = self.unknown_items = 0

    def batch(self, table: pa.Table, where: str = "the input") -> tuple[RankingBatch, np.ndarray]:
        """The batch, and which of its rows have an item that the model knows, bool [B]. where: as in ClickRows.

        Raises DataError for a missing column or values of another kind.
        """
        schema = self.collate.schema
        require_columns(where, table, [USER_COLUMN, ITEM_FEATURE, *schema.event_features])
        if not (count := table.num_rows):  # ranks take as many batches each; this one predicts nothing
            table = pa.table({name: pa.nulls(1) for name in table.column_names})
        user_ids_B, known_B = self.users.lookup(table.column(USER_COLUMN))
        rows_B = np.where(known_B, self._rows_of(user_ids_B), -1)
        histories = self._histories(rows_B)
        items_B = self.vocabularies[ITEM_FEATURE].ids(table.column(ITEM_FEATURE))
        known_B = (items_B > 0) & (items_B < schema.item_cardinality)
        self.unknown_users += int((rows_B[:count] < 0).sum())
        self.unknown_items += int((~known_B[:count]).sum())
        lengths_B = histories.lengths_B()
        newest = {"item_ids": np.where(known_B, items_B, 0)}
        newest |= {name: self.vocabularies[name].ids(table.column(name)) for name in schema.event_features}
        for name, size in schema.event_features.items():
            newest[name] = np.where((newest[name] >= 0) & (newest[name] < size), newest[name], 0)
        if schema.timestamps:
            newest["timestamps"] = self._times(where, table, histories, lengths_B)
        columns = {}
        for name in schema.event_columns:
            past = histories.gather(name, np.zeros_like(lengths_B), lengths_B)
            added = newest.get(name, np.zeros(len(lengths_B), dtype=past.dtype)).astype(past.dtype)
            columns[name] = np.insert(past, np.cumsum(lengths_B), added)
        columns |= {name: histories.user_values(name) for name in [USER_COLUMN, *schema.user_columns]}
        offsets = np.concatenate([[0], np.cumsum(lengths_B + 1)]).astype(np.int64)
        size = len(lengths_B)
        extended = Rows(
            [Histories(offsets, columns)], np.zeros(size, dtype=np.int64), np.arange(size), schema.timestamps
        )
        batch, _ = self.collate.scored(extended, lengths_B + 1, np.full(size, int(count > 0)), 0)
        return batch, known_B[:count]

    def _rows_of(self, user_ids_B: np.ndarray) -> np.ndarray:
        """The row of each user in the data; -1 where there is none."""
        if not len(self._user_ids):
            return np.full(len(user_ids_B), -1)
        place_B = np.searchsorted(self._user_ids, user_ids_B, sorter=self._order)
        row_B = self._order[np.minimum(place_B, len(self._order) - 1)]
        return np.where(self._user_ids[row_B] == user_ids_B, row_B, -1)

    def _histories(self, rows_B: np.ndarray) -> Rows:
        group_B = np.where(rows_B < 0, -1, np.searchsorted(self._starts, rows_B, side="right") - 1)
        chosen = np.unique(group_B[group_B >= 0])
        groups = [self._group(int(index)) for index in chosen]
        within_B = np.where(group_B < 0, 0, rows_B - self._starts[group_B])
        place_B = np.where(group_B < 0, -1, np.searchsorted(chosen, group_B))
        if not groups:  # columns have their types from a group
            groups = [self._group(0)]
        return Rows(groups, place_B, within_B, self.data.schema.timestamps)

    def _group(self, index: int) -> Histories:
        if index not in self._groups:
            self._groups[index] = self.data.read_row_group(index, self.collate.columns)
            if len(self._groups) > _GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(index)
        return self._groups[index]

    def _times(self, where: str, table: pa.Table, histories: Rows, lengths_B: np.ndarray) -> np.ndarray:
        """Seconds: those of the column timestamp, or of the newest event."""
        last_B = np.zeros(len(lengths_B), dtype=np.int64)
        some_B = lengths_B > 0
        last_B[some_B] = histories.gather("timestamps", np.maximum(lengths_B - 1, 0), some_B.astype(np.int64))
        if TIME not in table.column_names:
            return last_B
        unit = self.data.schema.time_unit
        times = checked_column(where, table, TIME, ColumnType("time", time_unit=unit), nulls=False)
        times_B = np.where(times.nulls, last_B, times.filled // PER_SECOND[unit])
        if (late := times_B >= LAST_SECOND).any():
            raise DataError(f"{where}: row {int(late.argmax())}, column {TIME}: is beyond the year 9999")
        if (early := times_B < last_B).any():
            row = int(early.argmax())
            raise DataError(
                f"{where}: row {row}, column {TIME}: {times_B[row]} s is before the user's newest event, "
                f"{last_B[row]} s"
            )
        return times_B
