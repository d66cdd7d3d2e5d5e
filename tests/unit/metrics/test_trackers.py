"""Trackers against their real packages, without a network; what is said where a package is missing."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gr.config import RetrievalConfig
from gr.config.run import MLflowConfig, TensorBoardConfig, WandbConfig
from gr.errors import ConfigError, InstallError
from gr.metrics.trackers import check_installed, open_trackers
from tests.support.tiny import tiny_config


def configured(tmp_path: Path, **writer: Any) -> RetrievalConfig:
    (tmp_path / "run").mkdir(exist_ok=True)
    return tiny_config(tmp_path, tmp_path / "run", trainer={"writers": [writer]})


def track(config: RetrievalConfig, *steps: int, done: int = 0) -> None:
    [tracker] = open_trackers(config, done)
    for step in steps:
        tracker.write(step, "train", {"loss": 1.0 / step})
        tracker.write(step, "validation", {"hr@10": 0.5})
    tracker.close()


def test_tensorboard_keeps_the_configuration(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path / "run")
    assert config.trainer.writers == (TensorBoardConfig(),)
    track(config, 1, 2)
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.value for event in board.Scalars("train/loss")] == [1.0, 0.5]
    [text] = board.Tensors("config/text_summary")
    assert b"global_batch_size" in text.tensor_proto.string_val[0]


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_the_run(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InstallError, match=rf"^trainer.writers: {kind} is not installed: `pip install 'gr\[{kind}\]'`"):
        check_installed(configured(tmp_path, kind=kind))
    check_installed(tiny_config(tmp_path, tmp_path / "run"))


@pytest.mark.slow
def test_wandb(tmp_path: Path) -> None:
    """Offline, a run is a folder of records; a resumed run has the same id."""
    pytest.importorskip("wandb", reason="needs the extra wandb")
    config = configured(tmp_path, kind="wandb", project="p", mode="offline")
    assert isinstance(config.trainer.writers[0], WandbConfig)
    track(config, 1, 2)
    run = (tmp_path / "run/.wandb-run").read_text().strip()
    track(config, 2, 3, done=1)
    assert (tmp_path / "run/.wandb-run").read_text().strip() == run
    records = sorted((tmp_path / "run/wandb").glob(f"offline-run-*/run-{run}.wandb"))
    assert records
    written = b"".join(path.read_bytes() for path in records)
    assert b"train/loss" in written and b"validation/hr@10" in written and b"global_batch_size" in written
    track(config, 1)
    assert (tmp_path / "run/.wandb-run").read_text().strip() != run, "from the start: another run"


@pytest.mark.slow
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a store of files, which its client reads back."""
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    uri = (tmp_path / "mlruns").as_uri()
    config = configured(tmp_path, kind="mlflow", uri=uri, experiment="e")
    assert isinstance(config.trainer.writers[0], MLflowConfig)
    track(config, 1, 2)
    track(config, 3, done=2)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in losses) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert run.data.metrics["validation/hr_at_10"] == 0.5 and run.info.status == "FINISHED"
    assert run.data.params["model.tower.kind"] == "hstu"
    assert json.loads(run.data.params["trainer.global_batch_size"]) == config.trainer.global_batch_size


def test_a_server_that_is_none_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    with pytest.raises(ConfigError, match=r"^trainer.writers: mlflow does not start: .*; see the writer's uri, or"):
        open_trackers(configured(tmp_path, kind="mlflow", uri="nonsense://x"), 0)
