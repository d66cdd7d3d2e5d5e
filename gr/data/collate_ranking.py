"""Collation for ranking: rows of decoded row groups become batches. B examples, T events, C tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gr.batch import ITEM_FEATURE, RankingBatch
from gr.config.ranking import ActionTask, RankingDataConfig, RankingTaskConfig
from gr.data.collate import Counts, Events, Rows, chosen_events
from gr.data.stochastic_length import Draws, random_ends
from gr.errors import ConfigError
from gr.schema import DataSchema


@dataclass(frozen=True)
class RankingCollate:
    """The collation of one data folder. Raises ConfigError where a task names no column of it."""

    schema: DataSchema
    config: RankingDataConfig
    task: RankingTaskConfig

    def __post_init__(self) -> None:
        numbers = [*["ratings"] * self.schema.ratings, *self.schema.values]
        for place, task in enumerate(self.task.tasks):
            key, known = ("action", self.schema.actions) if isinstance(task, ActionTask) else ("value", numbers)
            if task.name not in known:
                raise ConfigError(
                    f"task.tasks.{place}.{key}={task.name}: {self.schema.name} has no such {key}; it has "
                    f"{', '.join(known) or 'none'} (schema.json)"
                )

    @cached_property
    def columns(self) -> Sequence[str]:
        return ["user_id", *self.schema.event_columns, *self.schema.user_columns]

    def __call__(self, rows: Rows, draws: Draws, first_example: int) -> tuple[RankingBatch, Counts]:
        """A batch to train on: each example is without its newest config.train_holdout events."""
        stop_B = np.maximum(rows.lengths_B() - self.config.train_holdout, 0)
        if self.config.cut == "uniform":
            stop_B = random_ends(stop_B, draws)
        if self.task.supervision == "all":
            chosen, dropped = chosen_events(rows, stop_B, self.config, draws)
            scored_B = chosen.length_B
        else:
            scored_B = np.minimum(stop_B, self.config.candidates)
            chosen, dropped = self._with_scored(rows, stop_B, scored_B, draws)
        counts = Counts(int(chosen.start_B.sum()), int((stop_B < 1).sum()), dropped, int(chosen.length_B.sum()))
        return self._batch(rows, chosen, scored_B, first_example), counts

    def newest(self, rows: Rows, *, newest: int, before: int) -> tuple[RankingBatch, Counts]:
        """A batch to evaluate on: the `newest` events of each user that lie before its `before` newest ones."""
        stop_B = np.maximum(rows.lengths_B() - before, 0)
        return self.scored(rows, stop_B, np.minimum(stop_B, newest), 0)

    def scored(
        self, rows: Rows, stop_B: np.ndarray, scored_B: np.ndarray, first_example: int
    ) -> tuple[RankingBatch, Counts]:
        """A batch of the first stop_B events of each user. The newest scored_B are predicted, as far as they fit."""
        length_B = np.where(scored_B > 0, np.minimum(stop_B, self.config.max_length), 0)
        start_B = stop_B - length_B
        fitting_B = np.minimum(scored_B, length_B)
        counts = Counts(
            truncated_tokens=int(start_B[scored_B > 0].sum()),
            without_target=int(((scored_B < 1) & (rows.group_B >= 0)).sum()),
            tokens=int(length_B.sum()),
            unpredicted=int((scored_B - fitting_B).sum()),
        )
        return self._batch(rows, Events(start_B, length_B), fitting_B, first_example), counts

    def _with_scored(self, rows: Rows, stop_B: np.ndarray, scored_B: np.ndarray, draws: Draws) -> tuple[Events, int]:
        """The result of chosen_events, except that the newest scored_B events always stay: they are no history."""
        room = self.config.model_copy(update={"max_length": self.config.max_length - self.config.candidates})
        history, dropped = chosen_events(rows, stop_B - scored_B, room, draws)
        length_B = history.length_B + scored_B
        if history.kept_T is None:
            return Events(history.start_B, length_B), dropped
        places = np.empty(int(length_B.sum()), dtype=np.int64)
        from_end = np.repeat(np.cumsum(length_B), length_B) - np.arange(len(places))
        is_scored = from_end <= np.repeat(scored_B, length_B)
        places[~is_scored] = history.kept_T
        places[is_scored] = (np.repeat(stop_B, length_B) - from_end)[is_scored]
        return Events(history.start_B, length_B, places), dropped

    def _batch(self, rows: Rows, chosen: Events, scored_B: np.ndarray, first_example: int) -> RankingBatch:
        schema = self.schema

        def events(column: str) -> np.ndarray:
            return rows.values(column, chosen)

        length_B = chosen.length_B
        actions_T = events("actions") if schema.actions else np.zeros(int(length_B.sum()), dtype=np.int64)
        labels = [
            (actions_T >> schema.actions.index(task.action) & 1) if isinstance(task, ActionTask) else events(task.value)
            for task in self.task.tasks
        ]
        nonempty_B = length_B > 0
        keys = [ITEM_FEATURE, *schema.event_features, *schema.contextual]
        ids = [events("item_ids"), *(events(name) for name in schema.event_features)]
        ids += [rows.user_values(name)[nonempty_B] for name in schema.contextual]
        lengths = [length_B] * (1 + len(schema.event_features)) + [nonempty_B.astype(np.int64)] * len(schema.contextual)
        numeric = [rows.user_values(name) * nonempty_B for name in schema.contextual_numeric]
        return RankingBatch(
            features=KeyedJaggedTensor(
                keys=keys,
                values=torch.from_numpy(np.concatenate(ids)),
                lengths=torch.from_numpy(np.concatenate(lengths)),
            ),
            actions_T=torch.from_numpy(actions_T),
            labels_TC=torch.from_numpy(np.stack(labels, axis=1).astype(np.float32)),
            timestamps_T=torch.from_numpy(events("timestamps")) if schema.timestamps else None,
            numeric_BK=torch.from_numpy(np.stack(numeric, axis=1).astype(np.float32))
            if numeric
            else torch.zeros(len(length_B), 0),
            user_B=torch.from_numpy(rows.user_values("user_id")),
            scored_B=torch.from_numpy(scored_B),
            scored=int(scored_B.sum()),
            first_example=first_example,
            contextual=len(schema.contextual),
        )
