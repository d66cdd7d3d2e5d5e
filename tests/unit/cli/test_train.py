"""`gr train` as a new user gets it wrong: one clear line, exit code 2, no traceback, and no half-made run folder."""

import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from gr import watchdog
from gr.cli import main
from gr.dist import World
from gr.prepare.write import FolderWriter, Users
from gr.schema import HistoryColumns
from gr.status import RunStatus, StatusFile, read_status
from gr.training import run_folder as folder
from tests.support.run_folder import reason_alone
from tests.support.tiny import write_tiny

Refused = Callable[..., str]


def test_a_run(config: str, run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", config]) == 0
    shown = capfd.readouterr()
    assert "step 4/4  loss " in shown.err and "ETA 00:00" in shown.err
    assert "test split, " in shown.out and f"checkpoint: {run_dir}/checkpoints/step-00000004 (step 4)" in shown.out
    assert sorted(path.name for path in run_dir.iterdir()) == [
        ".lock",
        ".status.json.lock",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "plan.json",
        "report.json",
        "status.json",
        "tensorboard",
        "test-ranks.npy",
    ]
    assert json.loads((run_dir / "report.json").read_text())["step"] == 4
    status = read_status(run_dir)
    assert (status.state, status.step, status.steps, status.checkpoint) == ("done", 4, 4, 4)
    assert status.error is None and status.loss and status.seconds_per_step and status.save_seconds


def test_no_config_file(refused: Refused, tmp_path: Path) -> None:
    assert refused("train", f"{tmp_path}/none.yaml") == f"{tmp_path}/none.yaml: no such file"


def test_an_unknown_key(refused: Refused, config: str) -> None:
    said = refused("train", config, "trainer.stepz=3")
    assert "trainer.stepz: unknown key; did you mean 'steps'?" in said
    Path(config).write_text(Path(config).read_text() + "sed: 3\n")
    assert "tiny.yaml:" in (said := refused("train", config)) and "sed: unknown key; did you mean 'seed'?" in said


def test_no_data_folder(refused: Refused, config: str, run_dir: Path, tmp_path: Path) -> None:
    said = refused("train", config, f"data.path={tmp_path}/none")
    own = "of your own log with `gr prepare events`"
    assert said == f"{tmp_path}/none: no such folder; `gr prepare ... --out {tmp_path}/none` writes one, {own}"
    (tmp_path / "empty").mkdir()
    assert refused("train", config, f"data.path={tmp_path}/empty").startswith(f"{tmp_path}/empty/schema.json: cannot")
    said = refused("train", config, f"evaluation.path={tmp_path}/none")
    assert said.startswith(f"{tmp_path}/none: no such folder") and reason_alone(run_dir) == said


def test_a_world_size_that_does_not_divide(refused: Refused, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of 3 ranks that torchrun started."""

    @contextmanager
    def of_three(device: str, **_: object) -> Iterator[World]:
        yield World(0, 3, 0, 3, torch.device("cpu"))

    monkeypatch.setattr("gr.dist.world", of_three)
    monkeypatch.setattr(World, "from_main", lambda self, text: text)  # there are no others
    assert refused("train", config).startswith("data.lanes=4 is not divisible by the 3 ranks of this run: use a number")
    said = refused("train", config, "data.lanes=6", "trainer.global_batch_size=12")
    assert said.startswith("evaluation.global_batch_size=16 is not divisible by the 3 ranks of this run: use a number")


def test_a_gpu_that_is_not_there(refused: Refused, config: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused("train", config, "device=cuda")
    assert said.startswith("device=cuda, but torch sees no GPU here: set device=cpu") and reason_alone(run_dir) == said


def test_a_refusal_leaves_the_status_of_another_run_alone(
    refused: Refused, config: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir.mkdir()
    first = RunStatus("running", 7, 9, 1)
    StatusFile(run_dir).start(first)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(folder.log, "info", lambda *_: None)
        refused("train", config, "device=cuda")
    assert read_status(run_dir) == first


def test_ranks_that_cannot_be_reached_are_no_failure(
    config: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Their host may be coming back: a launcher tries again."""
    monkeypatch.setattr("gr.dist.CONNECT_SECONDS", 0.2)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", config]) == 1
    assert "cannot reach rank 0 at 127.0.0.1:1" in capfd.readouterr().err and not run_dir.exists()


def test_a_stop_while_planning(
    config: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it goes on")

    with monkeypatch.context() as planning:
        planning.setattr("gr.experiment.make_plan", stopped)
        assert main(["train", config]) == 0
    assert "stopped outside the steps" in capfd.readouterr().err
    assert (read_status(run_dir).state, read_status(run_dir).checkpoint) == ("stopped", None)
    assert main(["train", config]) == 0 and read_status(run_dir).state == "done"


def test_a_stop_in_the_final_report_and_its_time_limit(
    config: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report has the time of an evaluation, not what is left of that of the last checkpoint."""
    budgets: list[str | None] = []
    monkeypatch.setattr(watchdog, "enter", lambda place, budget=None: budgets.append(budget) if budget else None)

    def stopped(*_: object) -> None:
        budgets.append("the report")
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as reporting:
        reporting.setattr("gr.experiment._final_report", stopped)
        assert main(["train", config]) == 0
    assert budgets[-2:] == ["evaluation", "the report"]
    assert (read_status(run_dir).state, read_status(run_dir).checkpoint) == ("stopped", 4)
    assert main(["train", config]) == 0 and read_status(run_dir).state == "done"


def test_time_bias_without_timestamps(refused: Refused, config: str, run_dir: Path, tmp_path: Path) -> None:
    said = refused("train", config, "model.tower.time_bias=true")
    assert said == f"model.tower.time_bias=true, but {tmp_path}/data has no timestamps: set it to false"
    timed = write_tiny(tmp_path / "timed", timestamps=True)
    paths = [f"data.path={timed}", f"evaluation.path={tmp_path}/data"]
    assert refused("train", config, "model.tower.time_bias=true", *paths) == said, "it is the other folder's this time"
    assert reason_alone(run_dir) == said


def test_evaluation_data_of_other_items(refused: Refused, config: str, tmp_path: Path) -> None:
    """Without the check the first evaluation would look up rows that the table has not."""
    writer = FolderWriter(tmp_path / "other", HistoryColumns(), item_cardinality=100)
    writer.write(Users(np.arange(4), np.arange(0, 21, 5), np.arange(80, 100)))
    writer.close(name="other", order="as given", source="a test", corpus=np.arange(1, 100))
    said = refused("train", config, f"evaluation.path={tmp_path}/other")
    assert f"{tmp_path}/data and {tmp_path}/other differ in item_cardinality: 61 and 100" in said


def test_nothing_to_load_from(refused: Refused, config: str, tmp_path: Path) -> None:
    said = refused("train", config, f"checkpoint.load_from={tmp_path}/none")
    assert said.startswith(f"{tmp_path}/none: no checkpoint there")


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_run_folder_that_is_a_file(refused: Refused, config: str, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    said = refused("train", config, f"run_dir={tmp_path}/file{below}")
    assert said.startswith(f"run_dir={tmp_path}/file{below} cannot be written: ") and said.endswith("set another one")


def test_a_table_that_the_model_has_not(refused: Refused, config: str) -> None:
    said = refused("train", config, "planner.tables.item=row_wise")
    assert said == "planner.tables: no table named item; the model has item_id"


def test_a_plan_from_a_file(
    refused: Refused, config: str, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The plan that a run leaves beside its configuration serves another run of the model, and no other model."""
    assert main(["train", config]) == 0
    plan = f"{run_dir}/plan.json"
    assert main(["train", config, "--plan", plan, f"run_dir={tmp_path}/again"]) == 0
    assert (tmp_path / "again/plan.json").read_text() == Path(plan).read_text()
    assert f"plan: {plan}" in (tmp_path / "again/config.yaml").read_text()
    assert main(["evaluate", "--checkpoint", f"{tmp_path}/again"]) == 0
    capfd.readouterr()
    assert "model" in refused("train", config, "--plan", plan, "model.dim=16", f"run_dir={tmp_path}/wide")
    assert f"{tmp_path}/none.json" in refused("train", config, "--plan", f"{tmp_path}/none.json")
