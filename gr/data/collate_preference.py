"""Collation for the preference stage: each position's next item, and items that the user liked less soon after it.

B examples, T packed tokens, W events of a window, S items drawn, K rejected and drawn ones, C of the corpus. A place is
the index of an event in the history of its example.
"""

import numpy as np
import torch

from gr.batch import PreferenceBatch, PromptBatch
from gr.config.histories import HistoryDataConfig
from gr.config.preference import ActionLevels, PreferenceTaskConfig, RatingLevels
from gr.data.collate import Counts, Events, Rows, collate_positions, collate_train, item_ids, times
from gr.data.stochastic_length import COMPARE, Draws
from gr.schema import DataSchema


class PreferenceCollate:
    """columns: the event columns that a batch needs. level_column: the one of them that says how an event was liked."""

    def __init__(
        self, schema: DataSchema, data: HistoryDataConfig, task: PreferenceTaskConfig, corpus_C: np.ndarray
    ) -> None:
        """corpus_C: int64, the items that are drawn. Raises ConfigError where the data lacks what task.levels reads."""
        self.schema, self.data, self.task, self.corpus_C = schema, data, task, corpus_C
        self.level_column = task.levels.column(schema)
        self.columns = [*["timestamps"] * schema.timestamps, self.level_column]

    def __call__(self, rows: Rows, draws: Draws, first_example: int) -> tuple[PreferenceBatch, Counts]:
        """The positions of collate_train. The next item of each, where its level is task.chosen or more, is compared
        with the nearest events of the window that begins with it whose level is lower; the events that are held out are
        in no window.
        """
        batch, counts, targets, last_B = collate_positions(rows, draws, first_example, self.data)
        length_B, next_T = targets.length_B, targets.place_T
        W = self.task.window
        last_T1 = np.repeat(last_B, length_B)[:, None]
        place_TW = next_T[:, None] + np.arange(W)
        is_inside_TW = place_TW <= last_T1
        places = np.minimum(place_TW, last_T1).ravel()
        levels_TW = self.levels(rows.at(self.level_column, length_B * W, places)).reshape(-1, W)
        items_TW = rows.at("item_ids", length_B * W, places).reshape(-1, W)
        is_lower_TW = (levels_TW < levels_TW[:, :1]) & (levels_TW[:, :1] >= self.task.chosen)
        is_rejected_TW = is_inside_TW & is_lower_TW & (items_TW != items_TW[:, :1])
        nearest = np.argsort(~is_rejected_TW, axis=1, kind="stable")[:, : self.task.rejected]
        is_rejected = np.take_along_axis(is_rejected_TW, nearest, 1)
        gaps = (levels_TW[:, :1] - np.take_along_axis(levels_TW, nearest, 1)) * is_rejected
        rejected = np.take_along_axis(items_TW, nearest, 1) * is_rejected
        drawn_TS = self._drawn(draws.number_B.repeat(length_B), next_T, draws)
        drawn_gap_TS = np.maximum(levels_TW[:, :1], 1) * (drawn_TS != items_TW[:, :1])
        compared = PreferenceBatch(
            **vars(batch),
            rejected_TK=torch.from_numpy(np.concatenate([rejected, drawn_TS], 1)),
            gap_TK=torch.from_numpy(np.concatenate([gaps, drawn_gap_TS], 1)),
        )
        return compared, counts

    def prompts(self, rows: Rows, draws: Draws, first_example: int) -> tuple[PromptBatch, Counts]:
        """The examples of collate_train, each with its number."""
        batch, counts = collate_train(rows, draws, first_example, self.data)
        return PromptBatch(**vars(batch), number_B=torch.from_numpy(draws.number_B)), counts

    def _drawn(self, number_T: np.ndarray, next_T: np.ndarray, draws: Draws) -> np.ndarray:
        """Items for each position, int64 [T, S], by its example's number in the training order and its place in it."""
        S, C = self.task.drawn, len(self.corpus_C)
        place_TS = next_T[:, None] * S + np.arange(S)
        uniform = draws.uniform(COMPARE, number_T.repeat(S), place_TS.ravel())
        return self.corpus_C[np.minimum((uniform * C).astype(np.int64), C - 1)].reshape(len(next_T), S)

    def held_out(self, rows: Rows) -> tuple[PreferenceBatch, Counts]:
        """The two newest events of each user against one another, after the history before them: one pair a user at
        most, at the newest token; none where their levels are equal.
        """
        before_B = np.maximum(rows.lengths_B() - 2, 0)
        length_B = np.minimum(before_B, self.data.max_length)
        start_B = before_B - length_B
        is_there_B = before_B > 0
        two_B = 2 * is_there_B.astype(np.int64)
        items_P2 = rows.gather("item_ids", before_B, two_B).reshape(-1, 2)
        levels_P2 = self.levels(rows.gather(self.level_column, before_B, two_B)).reshape(-1, 2)
        gap_P = (levels_P2.max(1) - levels_P2.min(1)) * (items_P2[:, 0] != items_P2[:, 1])
        better_P = levels_P2.argmax(1)
        newest_P = np.cumsum(length_B)[is_there_B] - 1
        targets_T, rejected_T, gap_T = np.zeros((3, int(length_B.sum())), dtype=np.int64)
        targets_T[newest_P] = np.where(better_P == 0, items_P2[:, 0], items_P2[:, 1])
        rejected_T[newest_P] = np.where(better_P == 0, items_P2[:, 1], items_P2[:, 0])
        gap_T[newest_P] = gap_P
        history = Events(start_B, length_B)
        batch = PreferenceBatch(
            features=item_ids(rows.values("item_ids", history), length_B),
            target_ids_T=torch.from_numpy(targets_T),
            timestamps_T=times(rows, history),
            query_timestamps_T=times(rows, Events(start_B + 1, length_B)),
            first_example=0,
            rejected_TK=torch.from_numpy(rejected_T)[:, None],
            gap_TK=torch.from_numpy(gap_T)[:, None],
        )
        return batch, Counts(int(start_B.sum()), int((~is_there_B & (rows.group_B >= 0)).sum()))

    def levels(self, values_T: np.ndarray) -> np.ndarray:
        """The level of events, int64 [T], from the values of level_column."""
        match self.task.levels:
            case RatingLevels(thresholds=thresholds):
                return np.searchsorted(np.array(thresholds), values_T, side="right").astype(np.int64)
            case ActionLevels(order=order):
                levels_T = np.zeros(len(values_T), dtype=np.int64)
                for level, action in enumerate(order, start=1):
                    levels_T[(values_T >> self.schema.actions.index(action) & 1) > 0] = level
                return levels_T
