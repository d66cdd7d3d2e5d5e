"""Click: DLRM on rows of dense and categorical features, in one pass, each example scored before it is trained on."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from gr.batch import TabularBatch
from gr.config.click import ClickConfig, ClickLoss
from gr.data.click_rows import ClickRows
from gr.data.collate_tabular import tabular_batch
from gr.data.loader import ResumableLoader, rank_batch_size
from gr.data.tabular import TabularDataset, check_rows_alike
from gr.data.tabular_pass import TabularPass
from gr.dist import World
from gr.metrics.prequential import PrequentialMetrics
from gr.metrics.ranking import OneClassError, RankingMetrics
from gr.planner.estimate_dense import dense_work
from gr.recipes.answers import read_rows, scored_schema, with_scores
from gr.recipes.base import Answers, Evaluation, ReportTable, Training
from gr.recipes.folder import FolderRecipe
from gr.schema import TabularSchema
from gr.tasks import click_loss
from gr.training import callbacks
from gr.training.module import Inputs
from gr.training.trainer import Callback

COLUMNS = ("ne", "log_loss", "auc", "accuracy", "base_rate", "calibration")


class ClickObjective:
    """The loss of each example's label. scored: logits, labels."""

    def __init__(self, loss: ClickLoss) -> None:
        self.loss = loss
        self.scored: tuple[Tensor, ...] | None = None

    def losses(self, batch: TabularBatch) -> int:
        return len(batch.labels_B)

    def examples(self, batch: TabularBatch) -> int:
        return len(batch.labels_B)

    def inputs(self, batch: TabularBatch, step: int, first: int, device: torch.device) -> Inputs:
        batch = batch.to(device)
        return Inputs(batch, batch.sparse)

    def total(self, model: nn.Module, inputs: Inputs, looked_up: Any) -> Tensor:
        batch: TabularBatch = inputs.batch
        logits_B = model(batch.dense_BN, batch.sparse, looked_up)
        self.scored = logits_B.detach(), batch.labels_B
        return click_loss(logits_B, batch.labels_B, self.loss).sum()


class ClickRecipe(FolderRecipe[ClickConfig]):
    """Trains DLRM; evaluates on the rows of evaluation.path, where it is set."""

    schema: TabularSchema

    @cached_property
    def train_data(self) -> TabularDataset:
        return self._open(self.config.data.path)

    @cached_property
    def evaluation_data(self) -> TabularDataset | None:
        return self._open(self.config.evaluation.path) if self.config.evaluation.path else None

    def _open(self, path: str) -> TabularDataset:
        return TabularDataset.open(path, self.config.load_schema(Path(path)))

    @property
    def table_columns(self) -> int:
        return self.config.model.dim  # the column of row weights after them starts at zero

    def check_data(self) -> None:
        self.check_shared_tables()
        if (evaluated := self.evaluation_data) is not None:
            check_rows_alike(self.schema, self.folder, evaluated.schema, evaluated.path)

    def objective(self, world: World) -> ClickObjective:
        return ClickObjective(self.config.task.loss)

    def loader(self, world: World) -> ResumableLoader[TabularBatch]:
        config = self.config
        size = config.trainer.global_batch_size
        rows = TabularPass(
            self.train_data,
            global_batch_size=size,
            rank=world.rank,
            world_size=world.size,
            shuffle_seed=config.seed if config.data.shuffle else None,
            epochs=config.trainer.epochs or 1,
        )
        self.check_steps(len(rows), f"{size} rows", ", or to null and trainer.epochs to 2 or more")
        return ResumableLoader(rows)

    def flops(self) -> Callable[[TabularBatch], float]:
        work = dense_work(self.config.inventory(self.schema), 1)
        return lambda batch: (work.forward_flops + work.backward_flops) * len(batch.labels_B)

    def callbacks(self, training: Training) -> list[Callback]:
        settings, world = self.config.evaluation, training.world
        metrics = PrequentialMetrics("train", world, window=settings.window)
        assert isinstance(training.objective, ClickObjective)
        chosen: list[Callback] = [
            callbacks.Prequential(training.objective, metrics, training.writer, every=self.config.trainer.log_every)
        ]
        examples = self.evaluation_data.rows if self.evaluation_data is not None else 0
        shown = "auc", "ne", "log_loss", "calibration"
        return chosen + self.evaluation_callbacks(training, shown, f"{examples:,} examples")

    def measure(self, model: nn.Module, world: World) -> Evaluation:
        """Metrics over every row."""
        data = self.evaluation_data
        assert data is not None, "FolderRecipe measures what there is"
        metrics = RankingMetrics("evaluation", world)
        size = self.config.evaluation.global_batch_size
        all_rows = TabularPass(data, global_batch_size=size, rank=world.rank, world_size=world.size, drop_last=False)
        with ResumableLoader(all_rows) as loader:
            for batch in loader:
                rows = min(size, data.rows - batch.first_example)
                own = len(batch.labels_B)
                batch = batch.padded(-(-rows // world.size), [column.hots for column in data.schema.sparse])
                batch = batch.to(world.device)
                logits_B = model(batch.dense_BN, batch.sparse)
                metrics.update(logits_B[:own], batch.labels_B[:own])
        try:
            return Evaluation(metrics.compute())
        except OneClassError as error:
            return Evaluation(error.metrics, {"unmeasured": {"label": str(error)}})

    def predict(self, model: nn.Module, world: World, file: Path) -> Answers:
        """Column score: the probability of the label. Columns of the file: those of the training data."""
        rows = ClickRows(self.schema, {column.name: self.vocabulary(column.name) for column in self.schema.sparse})
        size = rank_batch_size("evaluation.global_batch_size", self.config.evaluation.global_batch_size, world.size)
        columns, tables = read_rows(file, world, size)
        schema = scored_schema(columns, ["score"])
        return Answers(schema, self._predicted(model, world, tables, rows, size, schema))

    @torch.no_grad()
    def _predicted(
        self,
        model: nn.Module,
        world: World,
        tables: Iterator[tuple[str, pa.Table]],
        rows: ClickRows,
        size: int,
        schema: pa.Schema,
    ) -> Iterator[pa.Table]:
        model.eval()
        hots = [column.hots for column in self.schema.sparse]
        for where, table in tables:
            read, _ = rows.read(table, where)
            batch = tabular_batch(read, self.schema).padded(size, hots).to(world.device)
            score_B = model(batch.dense_BN, batch.sparse).float().sigmoid()[: table.num_rows].cpu()
            yield with_scores(table, schema, [pa.array(score_B.numpy())])

    @classmethod
    def tables(cls, report: Mapping[str, Any]) -> list[ReportTable] | str:
        if not report["model"]:
            return "evaluation.path is unset: see the prequential metrics in metrics.jsonl"
        title = f"{report['data']}, {report['model']['examples']:,.0f} examples"
        return [ReportTable(title, {"model": report["model"]}, COLUMNS)]
