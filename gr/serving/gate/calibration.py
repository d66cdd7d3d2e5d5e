"""Rows that a model was not trained on, to measure its other forms on. P rows, C tasks."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, singledispatch
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gr.config.ranking import ActionTask
from gr.data.collate_ranking import RankingCollate
from gr.data.dataset import Dataset, check_alike, read_corpus
from gr.data.history_batches import UserBatches, evaluation_batches
from gr.data.loader import checksums
from gr.data.tabular import TabularDataset, check_rows_alike
from gr.data.tabular_pass import TabularPass
from gr.errors import ServingError
from gr.models.retrieval import RetrievalModel
from gr.models.saved import ALONE, Saved
from gr.models.saved_click import SavedClick
from gr.models.saved_ranking import SavedRanking
from gr.models.saved_retrieval import SavedRetrieval
from gr.schema import HistoryColumns
from gr.serving.gate.accuracy_gate import GateReport, Limits, TaskReport, binary_task, retrieval_task, value_task
from gr.tasks import CorpusRanker, require_product

ROWS = 200_000  # NE changes of 0.02 % have standard errors of about 0.01 % there


@dataclass(frozen=True)
class Calibration(ABC):
    """Batches in memory, and how a model answers them. data: their folder. identity: checksums of it."""

    saved: Saved
    batches: Sequence[Any]
    data: Path
    identity: dict[str, int | None]

    @abstractmethod
    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """The output of the model's last layer for a batch."""

    @torch.no_grad()
    def predict(self, model: nn.Module) -> np.ndarray:
        """The values compared of all rows: outputs [P, C], or places [P]."""
        return torch.cat([self.forward(model, batch).float() for batch in self.batches]).cpu().numpy()

    @cached_property
    def reference(self) -> np.ndarray:
        """The answers of the model itself, computed once: ask for them while its weights are as they were trained."""
        return self.predict(self.saved.model)

    @abstractmethod
    def tasks(self, reference: np.ndarray, candidate: np.ndarray, limits: Limits) -> list[TaskReport]:
        """The measures of each task, of what predict() gave for both."""

    def gate(self, candidate: np.ndarray, limits: Limits) -> GateReport:
        """The verdict on a candidate, beside the model itself. candidate: what predict() gave. Raises ServingError."""
        tasks = self.tasks(self.reference, candidate, limits)
        return GateReport.of(tasks, limits, data=str(self.data), data_checksums=self.identity)


@singledispatch
def calibration(saved: Saved, data: str | Path | None = None, rows: int = ROWS) -> Calibration:
    """The calibration rows of a saved model, at least `rows` of them or all that there are, in the order of the data.

    data: a folder of rows that the model was not trained on; None: evaluation.path of its configuration, or what was
    held out of data.path. Raises ServingError where there is none, DataError where the model cannot read it. A further
    kind of model registers a function for its class of Saved.
    """
    raise ServingError(f"{saved.config.kind} models have no accuracy gate: register one with calibration.register")


@dataclass(frozen=True)
class ClickCalibration(Calibration):
    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch.dense_BN, batch.sparse)[:, None]

    def tasks(self, reference: np.ndarray, candidate: np.ndarray, limits: Limits) -> list[TaskReport]:
        labels_P = np.concatenate([batch.labels_B.numpy() for batch in self.batches])
        return [binary_task("click", labels_P, reference[:, 0], candidate[:, 0], limits)]


@calibration.register
def _(saved: SavedClick, data: str | Path | None = None, rows: int = ROWS) -> Calibration:
    config: Any = saved.config
    path = _folder(saved, data, config.evaluation.path)
    dataset = TabularDataset.open(path, config.load_schema(path))
    check_rows_alike(saved.schema, saved.folder, dataset.schema, path)
    size = config.evaluation.global_batch_size
    part = slice(0, min(rows, dataset.rows))
    held_out = TabularPass(dataset, global_batch_size=size, rank=0, world_size=1, rows=part, drop_last=False)
    batches = [batch for batch, _ in held_out.batches(0, held_out.stop)]
    return ClickCalibration(saved, batches, path, checksums(dataset.row_counts, dataset.schema))


@dataclass(frozen=True)
class RankingCalibration(Calibration):
    """The events of a user are one unit: they depend on each other."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch)

    def tasks(self, reference: np.ndarray, candidate: np.ndarray, limits: Limits) -> list[TaskReport]:
        targets = [batch.targets() for batch in self.batches]
        labels_PC, user_P = (torch.cat(parts).numpy() for parts in zip(*targets, strict=True))
        tasks = self.saved.config.task.tasks  # type: ignore[attr-defined]
        return [
            (binary_task if isinstance(task, ActionTask) else value_task)(
                task.name, labels_PC[:, index], reference[:, index], candidate[:, index], limits, user_P
            )
            for index, task in enumerate(tasks)
        ]


@calibration.register
def _(saved: SavedRanking, data: str | Path | None = None, rows: int = ROWS) -> Calibration:
    """The newest events of each user, those of the test and of the validation split where both were held out."""
    config: Any = saved.config
    newest = config.evaluation.newest
    fields = ("item_cardinality", *HistoryColumns.model_fields)
    dataset, splits = _histories(saved, data, fields, config.data.train_holdout // newest)
    collate = RankingCollate(saved.schema, config.data, config.task)
    passes = [
        UserBatches(
            dataset,
            config.data,
            partial(collate.newest, newest=newest, before=split * newest),
            columns=collate.columns,
            global_batch_size=config.evaluation.global_batch_size,
            rank=0,
            world_size=1,
        )
        for split in range(splits)
    ]
    batches = _first(passes, rows, lambda batch: batch.scored)
    return RankingCalibration(saved, batches, dataset.path, checksums(dataset.row_counts, dataset.schema))


@dataclass(frozen=True)
class RetrievalCalibration(Calibration):
    """Compares the place of each user's held-out item among the whole corpus."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        assert isinstance(model, RetrievalModel)
        return model.user_vectors(batch)

    @torch.no_grad()
    def predict(self, model: nn.Module) -> np.ndarray:
        assert isinstance(model, RetrievalModel)
        corpus_C, _ = read_corpus(self.saved.folder, self.saved.schema)
        ranker = CorpusRanker(torch.tensor(corpus_C), model.item_vectors, model.similarity, ALONE)
        places = [ranker.ranks(model.user_vectors(batch), batch)[batch.valid_B] for batch in self.batches]
        return torch.cat(places).cpu().numpy()

    def tasks(self, reference: np.ndarray, candidate: np.ndarray, limits: Limits) -> list[TaskReport]:
        users_P = torch.cat([batch.user_B[batch.valid_B] for batch in self.batches]).numpy()
        return [retrieval_task(reference, candidate, limits, users_P)]


@calibration.register
def _(saved: SavedRetrieval, data: str | Path | None = None, rows: int = ROWS) -> Calibration:
    require_product(saved.model.similarity, "an index of items")
    config: Any = saved.config
    fields = ("item_cardinality", *["timestamps"] * config.model.tower.uses_time)
    dataset, splits = _histories(saved, data, fields, config.data.train_holdout)
    ends: list[Literal[1, 2]] = [1, 2]
    passes = [
        evaluation_batches(
            dataset,
            config.data,
            target_from_end=end,
            global_batch_size=config.evaluation.global_batch_size,
            filter_seen=config.evaluation.filter_seen,
        )
        for end in ends[:splits]
    ]
    batches = _first(passes, rows, lambda batch: int(batch.valid_B.sum()))
    return RetrievalCalibration(saved, batches, dataset.path, checksums(dataset.row_counts, dataset.schema))


def _folder(saved: Saved, data: str | Path | None, configured: str | None) -> Path:
    if (folder := data or configured) is None:
        raise ServingError(
            f"{saved.folder} was trained without evaluation.path, so the accuracy gate has no rows: name a data folder"
        )
    return Path(folder)


def _histories(saved: Saved, data: str | Path | None, fields: Sequence[str], held_out: int) -> tuple[Dataset, int]:
    """The folder of users to measure on, and how many splits of it were not trained on. held_out: of data.path."""
    config: Any = saved.config
    own = data is None and config.evaluates_training_users
    path = _folder(saved, data, config.evaluation.path or config.data.path)
    if own and not held_out:
        raise ServingError(f"every event of {path} was trained on: name a folder of other users for the accuracy gate")
    dataset = Dataset.open(path)
    check_alike(saved.schema, saved.folder, config.load_schema(path), path, fields)
    return dataset, min(held_out, 2) if own else 1


def _first(passes: Iterable[Iterable[Any]], rows: int, count: Any) -> list[Any]:
    """The first batches of the passes that hold so many rows."""
    batches, total = [], 0
    for batch in (batch for each in passes for batch in each):
        if total >= rows:
            break
        batches.append(batch)
        total += count(batch)
    return batches
