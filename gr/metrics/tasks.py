"""Metrics of several tasks at once. P predictions, C tasks."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gr.config.ranking import ActionTask, ValueTask
from gr.dist import World
from gr.errors import DataError, TrainingError
from gr.logging import get_logger, log_once
from gr.metrics.prequential import PrequentialMetrics
from gr.metrics.ranking import LifetimeMetrics, OneClassError, RankingMetrics

log = get_logger(__name__)


class RegressionMetrics:
    """The squared error of one task over all examples since the start, in constant memory."""

    def __init__(self, task: str, world: World) -> None:
        self.task, self.world = task, world
        self._sums_5 = torch.zeros(5, dtype=torch.float64, device=world.device)

    def update(self, outputs_P: Tensor, labels_P: Tensor) -> None:
        outputs, labels = outputs_P.detach().double(), labels_P.double()
        terms = (torch.ones_like(labels), labels, labels.square(), (outputs - labels).square(), outputs)
        self._sums_5 += torch.stack([term.sum() for term in terms])

    def compute(self) -> dict[str, float]:
        """mse, label_variance (the mse of predicting the mean label) and examples, on every rank. Collective.

        Raises DataError for no example, TrainingError for outputs that are not finite.
        """
        count, label, square, error, output = self.world.all_reduce_sum(self._sums_5.tolist())
        if not count:
            raise DataError(f"task {self.task!r}: no example, so there is nothing to measure")
        if not (torch.tensor([output, error]).isfinite().all()):
            raise TrainingError(f"task {self.task!r}: predictions are not finite: the model has diverged")
        return {"mse": error / count, "label_variance": square / count - (label / count) ** 2, "examples": count}


BinaryMetrics = RankingMetrics | LifetimeMetrics | PrequentialMetrics


class MultiTaskMetrics:
    """Metrics of each task, named "task/metric"."""

    def __init__(
        self, tasks: Sequence[ActionTask | ValueTask], world: World, binary: Callable[[str], BinaryMetrics]
    ) -> None:
        """binary: a function that makes the metrics of a bce task from its name; RankingMetrics are grouped by user."""
        self._tasks = {
            task.name: binary(task.name) if isinstance(task, ActionTask) else RegressionMetrics(task.name, world)
            for task in tasks
        }
        self.unmeasured: dict[str, str] = {}

    def update(self, outputs_PC: Tensor, labels_PC: Tensor, user_P: Tensor) -> None:
        columns = zip(self._tasks.values(), outputs_PC.unbind(1), labels_PC.unbind(1), strict=True)
        for metrics, output_P, label_P in columns:
            if isinstance(metrics, RankingMetrics):
                metrics.update(output_P, label_P, groups_B=user_P)
            else:
                metrics.update(output_P, label_P)

    def compute(self) -> dict[str, float | None]:
        """The metrics of every task, on every rank, and in `unmeasured` why some are None. Collective.

        What does not exist is None and logged once: NE, AUC and calibration of labels of one class, or examples of a
        task that has none. Where the first task has no example it raises DataError.
        """
        values: dict[str, float | None] = {}
        self.unmeasured = {}
        for index, (name, metrics) in enumerate(self._tasks.items()):
            known: Mapping[str, float | None]
            try:
                known = metrics.compute()
            except DataError as error:
                if index == 0 and not isinstance(error, OneClassError):
                    raise
                known = error.metrics if isinstance(error, OneClassError) else {"examples": None}
                self.unmeasured[name] = str(error)
                log_once(log, str(error))
            values |= {f"{name}/{metric}": value for metric, value in known.items()}
        return values
