"""Ranking: what users will do with an item, from the sequence of what they did (arXiv 2402.17152, section 2.2)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from gr.batch import ITEM_FEATURE, RankingBatch
from gr.config.ranking import ActionTask, InterleavedInput, RankingConfig, RankingTaskConfig
from gr.data.candidate_rows import CandidateRows
from gr.data.collate_ranking import RankingCollate
from gr.data.history_batches import HistoryEpochs, UserBatches
from gr.data.loader import ResumableLoader, rank_batch_size
from gr.data.time_windows import WindowPass
from gr.dist import World
from gr.errors import CheckpointError, ConfigError, DataError
from gr.metrics.prequential import PrequentialMetrics
from gr.metrics.ranking import LifetimeMetrics, RankingMetrics
from gr.metrics.tasks import BinaryMetrics, MultiTaskMetrics
from gr.recipes.answers import read_rows, scored_schema, with_scores
from gr.recipes.base import Answers, Evaluation, ReportTable, Split, Training
from gr.recipes.histories import HistoryRecipe
from gr.schema import HistoryColumns
from gr.tasks import multitask_loss
from gr.training import callbacks
from gr.training.module import Inputs
from gr.training.trainer import Callback

NEWER_PARTS: dict[Split, int] = {"test": 0, "validation": 1}
COLUMNS = ("ne", "auc", "gauc", "accuracy", "base_rate", "calibration", "mse", "label_variance")


class RankingObjective:
    """The losses of all tasks at each predicted event. scored: outputs, labels, users."""

    def __init__(self, task: RankingTaskConfig) -> None:
        self.tasks = task.tasks
        self.scored: tuple[Tensor, ...] | None = None

    def losses(self, batch: RankingBatch) -> int:
        return batch.scored

    def examples(self, batch: RankingBatch) -> int:
        return len(batch.user_B)

    def inputs(self, batch: RankingBatch, step: int, first: int, device: torch.device) -> Inputs:
        batch = batch.to(device)
        return Inputs(batch, batch.features)

    def total(self, model: nn.Module, inputs: Inputs, looked_up: Any) -> Tensor:
        batch: RankingBatch = inputs.batch
        outputs_PC = model(batch, looked_up)
        labels_PC, user_P = batch.targets()
        self.scored = outputs_PC.detach(), labels_PC, user_P
        return multitask_loss(outputs_PC, labels_PC, self.tasks).sum()


class RankingRecipe(HistoryRecipe[RankingConfig]):
    """Trains SequenceRanker, in epochs or in one pass by windows of time; evaluates each user's newest events."""

    compared_columns = ("item_cardinality", *HistoryColumns.model_fields)

    def needs_time(self) -> dict[str, str]:
        parts = {"data.stream is set": self.config.data.stream, "model.time is set": self.config.model.time}
        return {setting: "unset it" for setting, part in parts.items() if part is not None} | super().needs_time()

    def check_saved(self, saved: RankingConfig, path: str) -> None:
        config = self.config
        self._check_same(saved, path, "model", "task")
        if saved.data.train_holdout != config.data.train_holdout:
            raise CheckpointError(
                f"{path} was trained with data.train_holdout={saved.data.train_holdout}, not "
                f"{config.data.train_holdout}: other events are held out. Use another run_dir"
            )
        if (saved.data.stream is None) != (config.data.stream is None):
            raise CheckpointError(
                f"{path} was trained {'without' if saved.data.stream is None else 'with'} data.stream"
            )

    def objective(self, world: World) -> RankingObjective:
        return RankingObjective(self.config.task)

    def tokens(self, events_N: np.ndarray) -> np.ndarray:
        context = len(self.schema.contextual) + len(self.schema.contextual_numeric)
        per_event = 2 if isinstance(self.config.model.input, InterleavedInput) else 1
        return per_event * events_N + context * (events_N > 0)

    def loader(self, world: World) -> ResumableLoader[RankingBatch]:
        """Raises DataError where no user has an event that the evaluations of a run predict: they would fail late."""
        config = self.config
        split: Split = "validation" if config.evaluation.every else "test"
        events = 1 + NEWER_PARTS[split] * config.evaluation.newest
        if self.held_out(split) and not self.some_user_has(events):
            raise DataError(
                f"{self.evaluation_data.path}: no user has {events} events, so there is nothing to evaluate "
                f"({split} split): name other users with evaluation.path"
            )
        collate = RankingCollate(self.schema, config.data, config.task)
        size = config.trainer.global_batch_size
        if config.data.stream is None:
            epochs = HistoryEpochs(
                self.train_data,
                config.data,
                collate,
                columns=collate.columns,
                seed=config.seed,
                global_batch_size=size,
                rank=world.rank,
                world_size=world.size,
            )
            return ResumableLoader(epochs)
        stream = WindowPass(
            self.train_data, config.data, collate, global_batch_size=size, rank=world.rank, world_size=world.size
        )
        self.check_steps(len(stream), f"{size} users")
        return ResumableLoader(stream)

    def callbacks(self, training: Training) -> list[Callback]:
        config, world, loader, writer = self.config, training.world, training.loader, training.writer
        first = config.task.tasks[0].name
        metrics = MultiTaskMetrics(
            config.task.tasks, world, lambda name: PrequentialMetrics(name, world, window=config.evaluation.window)
        )
        shown = [f"{first}/{name}" for name in callbacks.prequential.SHOWN]
        assert isinstance(training.objective, RankingObjective)
        every = config.trainer.log_every
        chosen: list[Callback] = [callbacks.Prequential(training.objective, metrics, writer, every=every, shown=shown)]
        assert isinstance(loader, ResumableLoader)
        stream = loader.source
        if isinstance(stream, WindowPass):
            chosen.append(
                callbacks.WindowEvaluation(
                    stream.starting_window,
                    lambda window: self._metrics(
                        training.model, world, stream.window(window), lambda name: LifetimeMetrics(name, world)
                    )[0],
                    writer,
                    shown=shown,
                )
            )
        if config.evaluation.every:
            chosen.append(
                callbacks.Evaluation(
                    lambda: self.evaluate(training.model, world, "validation").metrics,
                    training.checkpointing,
                    writer,
                    every=config.evaluation.every,
                    select_by=f"{first}/auc",
                    shown=[f"{first}/{name}" for name in ("auc", "ne")],
                    over=f"{self.evaluation_data.rows:,} users",
                )
            )
        return chosen

    def held_out(self, split: Split) -> bool:
        """True where the events of the split were kept out of training, or are of other users."""
        needed = self.config.evaluation.newest * (1 + NEWER_PARTS[split])
        return not self.config.evaluates_training_users or self.config.data.train_holdout >= needed

    def check_split(self, split: Split) -> None:
        if self.held_out(split):
            return
        others = "other users with evaluation.path"
        remedy = f"the test split, or {others}" if self.held_out("test") else others
        raise ConfigError(
            f"the {split} events were trained on (data.train_holdout={self.config.data.train_holdout}, "
            f"evaluation.newest={self.config.evaluation.newest}): evaluate {remedy}"
        )

    def evaluate(self, model: nn.Module, world: World, split: Split) -> Evaluation:
        """Metrics of the predictions of a split, by task; none where its events were trained on."""
        config, data = self.config, self.evaluation_data
        tasks = [task.name for task in config.task.tasks]
        details = {"split": split, "data": str(data.path), "tasks": tasks}
        if not self.held_out(split):
            return Evaluation({}, details)
        collate = RankingCollate(self.schema, config.data, config.task)
        newest = config.evaluation.newest
        batches = UserBatches(
            data,
            config.data,
            partial(collate.newest, newest=newest, before=NEWER_PARTS[split] * newest),
            columns=collate.columns,
            global_batch_size=config.evaluation.global_batch_size,
            rank=world.rank,
            world_size=world.size,
        )
        metrics, why = self._metrics(model, world, batches, lambda name: RankingMetrics(name, world, grouped=True))
        return Evaluation(metrics, details | ({"unmeasured": why} if why else {}))

    def predict(self, model: nn.Module, world: World, file: Path) -> Answers:
        """A column score_TASK for each task: the probability of an action, or the number; null for an unknown item.

        Columns of the file: those of CandidateRows. Histories are those of the evaluation data.
        """
        schema = self.schema
        read = {ITEM_FEATURE: self.vocabulary(ITEM_FEATURE)}
        read |= {name: self.vocabulary(name) for name in schema.event_features}
        collate = RankingCollate(schema, self.config.data, self.config.task)
        rows = CandidateRows(self.evaluation_data, collate, self.user_vocabulary(), read)
        size = rank_batch_size("evaluation.global_batch_size", self.config.evaluation.global_batch_size, world.size)
        columns, tables = read_rows(file, world, size)
        answers = Answers(scored_schema(columns, [f"score_{task.name}" for task in self.config.task.tasks]), ())
        answers.tables = self._predicted(model, world, tables, rows, answers)
        return answers

    @torch.no_grad()
    def _predicted(
        self,
        model: nn.Module,
        world: World,
        tables: Iterator[tuple[int, pa.Table]],
        rows: CandidateRows,
        answers: Answers,
    ) -> Iterator[pa.Table]:
        model.eval()
        tasks = self.config.task.tasks
        for first_row, table in tables:
            batch, known_B = rows.batch(table, first_row)
            outputs_BC = model(batch.to(world.device)).float().cpu()
            columns = [
                (output_B.sigmoid() if isinstance(task, ActionTask) else output_B).numpy()
                for task, output_B in zip(tasks, outputs_BC.T, strict=True)
            ]
            yield with_scores(table, answers.schema, [pa.array(values_B, mask=~known_B) for values_B in columns])
        counted = [float(rows.unknown_users), float(rows.unknown_items)]
        totals = (int(count) for count in world.all_reduce_sum(counted))
        answers.counts |= dict(zip(("unknown_users", "unknown_items"), totals, strict=True))

    @torch.no_grad()
    def _metrics(
        self, model: nn.Module, world: World, batches: Iterable[RankingBatch], binary: Callable[[str], BinaryMetrics]
    ) -> tuple[dict[str, float | None], dict[str, str]]:
        """The metrics, and why some of them are None, by task."""
        metrics = MultiTaskMetrics(self.config.task.tasks, world, binary)
        was_training = model.training
        model.eval()
        for batch in batches:
            batch = batch.to(world.device)
            metrics.update(model(batch), *batch.targets())
        model.train(was_training)
        return metrics.compute(), metrics.unmeasured

    @classmethod
    def tables(cls, report: Mapping[str, Any]) -> list[ReportTable] | str:
        if not report["model"]:
            return "every event was trained on: see next_window in metrics.jsonl, each window before its training"
        tables = []
        for task in report["tasks"]:
            own = {name: value for name, value in report["model"].items() if name.startswith(f"{task}/")}
            metrics = {name.removeprefix(f"{task}/"): value for name, value in own.items()}
            title = f"{task}, {report['split']} split, {metrics['examples'] or 0:,.0f} predictions"
            tables.append(ReportTable(title, {"model": metrics}, [name for name in COLUMNS if name in metrics]))
        return tables
