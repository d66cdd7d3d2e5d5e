"""The trackers of metrics beside metrics.jsonl, by `kind` under trainer.writers: TensorBoard, Weights & Biases, MLflow.

Each keeps the resolved configuration with its run. The packages of the latter two are extras of gr.
"""

import importlib.util
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from gr.config import RunConfig, dump_config
from gr.config.run import WRITERS, MLflowConfig, TensorBoardConfig, WandbConfig
from gr.errors import ConfigError, InstallError
from gr.files import write_text

MLFLOW_BATCH = 100  # parameters that it takes at once


class Tracker(ABC):
    """One place that keeps metrics. faults: what write() raises where they cannot be delivered."""

    faults: ClassVar[tuple[type[Exception], ...]] = ()

    @abstractmethod
    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """kind: train, validation or test; it prefixes the names."""

    @abstractmethod
    def close(self) -> None: ...


def check_installed(config: RunConfig) -> None:
    """Raises InstallError where the package of a writer is missing."""
    for each in config.trainer.writers:
        if each.package and importlib.util.find_spec(each.package) is None:
            raise InstallError(
                f"trainer.writers: {each.kind} is not installed: `pip install 'gr[{each.kind}]'`, or leave it out"
            )


def open_trackers(config: RunConfig, steps_done: int) -> list[Tracker]:
    """The trackers of trainer.writers, for a run that starts after `steps_done` steps. Raises ConfigError."""
    return [WRITERS.target(each)(each, config, steps_done) for each in config.trainer.writers]


class TensorBoard(Tracker):
    """run_dir/tensorboard."""

    def __init__(self, tracker: TensorBoardConfig, config: RunConfig, steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(config.run_dir) / "tensorboard"
        self._board = SummaryWriter(str(folder), purge_step=steps_done + 1 if steps_done else None)
        self._board.add_text("config", f"```yaml\n{dump_config(config)}```", steps_done)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._board.close()


class Wandb(Tracker):
    """A run of Weights & Biases, which a resumed run continues. Its files are in run_dir/wandb."""

    def __init__(self, tracker: WandbConfig, config: RunConfig, steps_done: int) -> None:
        import wandb

        run_dir = Path(config.run_dir)
        try:
            self._run = wandb.init(
                project=tracker.project,
                mode=tracker.mode,
                name=config.run_dir,
                dir=str(run_dir),
                config=config.model_dump(mode="json"),
                id=_kept_run(run_dir, tracker.kind, steps_done) or None,
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
        except (wandb.Error, OSError) as error:
            raise ConfigError(
                f"trainer.writers: wandb does not start: {_line(error)}; `wandb login`, or set mode: offline there"
            ) from error
        _keep_run(run_dir, tracker.kind, self._run.id)
        # Its own count only grows, and a resumed run repeats steps.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        self._run.finish(exit_code=int(_failing()))


class MLflow(Tracker):
    """A run of MLflow, which a resumed run continues; its parameters are the configuration's values by key."""

    def __init__(self, tracker: MLflowConfig, config: RunConfig, steps_done: int) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        type(self).faults = (MlflowException, OSError)
        run_dir = Path(config.run_dir)
        try:
            self._client = MlflowClient(tracker.uri)
            self._run_id = _kept_run(run_dir, tracker.kind, steps_done)
            if not self._run_id:
                known = self._client.get_experiment_by_name(tracker.experiment)
                experiment = known.experiment_id if known else self._client.create_experiment(tracker.experiment)
                self._run_id = self._client.create_run(experiment, run_name=config.run_dir).info.run_id
                values = list(_flat(config.model_dump(mode="json")))
                for first in range(0, len(values), MLFLOW_BATCH):
                    some = [Param(name, str(value)) for name, value in values[first : first + MLFLOW_BATCH]]
                    self._client.log_batch(self._run_id, params=some)
            self._client.update_run(self._run_id, status="RUNNING")
        except (MlflowException, OSError) as error:
            raise ConfigError(
                f"trainer.writers: mlflow does not start: {_line(error)}; see the writer's uri, or MLFLOW_TRACKING_URI"
            ) from error
        _keep_run(run_dir, tracker.kind, self._run_id)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # MLflow admits no @ in names.
        metrics = [Metric(f"{kind}/{name.replace('@', '_at_')}", value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id, "FAILED" if _failing() else "FINISHED")


def _failing() -> bool:
    """True while an error ends the run, which the writer is closed by."""
    return sys.exc_info()[0] is not None


def _kept_run(run_dir: Path, kind: str, steps_done: int) -> str:
    """The tracker's run that a resumed run continues; empty for a run from the start."""
    path = run_dir / f".{kind}-run"
    return path.read_text(encoding="utf-8").strip() if steps_done and path.is_file() else ""


def _keep_run(run_dir: Path, kind: str, run: str) -> None:
    write_text(run_dir / f".{kind}-run", f"{run}\n")


def _flat(tree: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """The values below a section, by key: a.b.c."""
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _flat(value, f"{at}.{name}" if at else name)
    else:
        yield at, tree


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
