"""Epochs over user histories for training, in lanes: the order of docs/design/data-order.md.

B examples of a batch on this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gr.batch import RetrievalBatch
from gr.config.histories import HistoryDataConfig
from gr.data.collate import Counts, Rows, collate_train
from gr.data.dataset import Dataset, Histories
from gr.data.loader import ResumableSource, checksums
from gr.data.order import TrainingOrder, owned_lanes
from gr.data.stochastic_length import Draws
from gr.errors import ConfigError
from gr.logging import get_logger, log_once

log = get_logger(__name__)


class TrainCollate(Protocol):
    """The collation of one kind of training. columns: those it reads; None: those of a sequence model."""

    @property
    def columns(self) -> Sequence[str] | None: ...

    def __call__(self, rows: Rows, draws: Draws, first_example: int) -> tuple[Any, Counts]: ...


@dataclass(frozen=True)
class RetrievalCollate:
    """The collation of batches for retrieval."""

    config: HistoryDataConfig
    columns: Sequence[str] | None = None

    def __call__(self, rows: Rows, draws: Draws, first_example: int) -> tuple[RetrievalBatch, Counts]:
        return collate_train(rows, self.config, draws, first_example=first_example)


class HistoryEpochs(ResumableSource[Histories, Any]):
    """Endless epochs over the users. The cursor is the position: examples that each lane has given before a batch.

    The batch size is not part of the identity: it may change when a run resumes.
    """

    cursor_name, order_name = "position", "data order"
    identity_keys = "data folder, seed, data.lanes and data.shuffle"

    def __init__(
        self,
        dataset: Dataset,
        config: HistoryDataConfig,
        *,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        collate: TrainCollate | None = None,
    ) -> None:
        """global_batch_size: examples a step over all ranks. collate: None makes batches for retrieval.

        Raises ConfigError where the world size does not divide data.lanes, data.lanes does not divide the batch, or
        there are fewer rows than lanes.
        """
        if global_batch_size % config.lanes:
            raise ConfigError(
                f"trainer.global_batch_size={global_batch_size} is not divisible by data.lanes={config.lanes}; set one "
                "to a multiple or divisor of the other"
            )
        self._dataset, self._config = dataset, config
        self._collate = collate or RetrievalCollate(config)
        self._lanes = owned_lanes(config.lanes, rank, world_size)
        self._order = TrainingOrder(dataset.row_counts, lanes=config.lanes, seed=seed, shuffle=config.shuffle)
        self.stride = global_batch_size // config.lanes
        self.read_threads, self.prefetch = config.read_threads, config.prefetch
        self.capacity = 2 * len(self._lanes) + config.read_threads
        own: dict[str, int | None] = {"lanes": config.lanes, "seed": seed, "shuffle": int(config.shuffle), "rows": self._order.rows}
        self.identity = own | checksums(dataset.row_counts, dataset.schema)

    def read(self, row_group: int) -> Histories:
        return self._dataset.read_row_group(row_group, self._collate.columns, self._config.on_bad_row)

    def rows(self, cursor: int) -> tuple[np.ndarray, np.ndarray]:
        by_lane = [self._order.lane_rows(lane, cursor, self.stride) for lane in self._lanes]
        return self._order.locate(np.concatenate(by_lane))

    def collate(
        self, cursor: int, groups: Sequence[Histories], group_B: np.ndarray, row_B: np.ndarray
    ) -> tuple[Any, Counts]:
        first_example = cursor * self._order.lanes
        place_B = self._lanes.start * self.stride + np.arange(len(row_B))  # a rank's lanes follow one another
        draws = Draws(self._order.seed, first_example + place_B)
        return self._collate(Rows(groups, group_B, row_B, self._dataset.schema.timestamps), draws, first_example)

    def counters(self, counts: Counts) -> dict[str, int]:
        """Distinct bad rows emptied (including those read ahead); tokens older than the window; examples without a
        target; events that stochastic length left out, and all that stayed.
        """
        return {
            "bad_rows": self._dataset.bad_rows,
            "truncated_tokens": counts.truncated_tokens,
            "examples_without_target": counts.without_target,
            "subsampled_tokens": counts.subsampled_tokens,
            "tokens": counts.tokens,
        }

    def log(self, counts: Counts) -> None:
        config = self._config
        if counts.truncated_tokens:
            log_once(log, f"histories longer than data.max_length={config.max_length} are cut to their newest events")
        if counts.without_target:
            log_once(log, f"some users have no target after data.train_holdout={config.train_holdout}: empty examples")
        if self._dataset.bad_rows:
            log_once(log, f"{self._dataset.path} has bad rows; data.on_bad_row=skip empties them")
