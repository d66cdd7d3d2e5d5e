"""Two agents on this machine, as two nodes would be: torchx's local_cwd scheduler."""

import subprocess

import pytest

from tests.launcher import job
from tests.support.patience import PATIENCE_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("local")]  # one worker makes the job that all compare with


def torchx(python, workspace, *arguments: str) -> subprocess.CompletedProcess:
    environment = job.environment()
    path = f"{python.parent}:{environment['PATH']}"
    return subprocess.run(
        [python, "-m", "torchx.cli.main", "run", "-s", "local_cwd", *arguments],
        cwd=workspace,
        env=environment | {"PATH": path, "PYTHON_EXEC": str(python)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def test_two_agents_train_as_one_torchrun_does(python, workspace, experiment, whole, tmp_path):
    pytest.importorskip("torchx", reason="needs torchx: the extra launch")
    run_dir = tmp_path / "run"
    component = ["launch/components.py:train", "--config", str(experiment), "--nnodes", "2", "--nproc", "1"]
    done = torchx(python, workspace, *component, "--", f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    assert dict(job.losses(run_dir)) == whole
    logs = [log.read_text() for log in sorted((run_dir / "logs").rglob("stderr.log"))]
    assert len(logs) == 2 and any(f"step {job.STEPS}/{job.STEPS}" in log for log in logs)
    evaluated = torchx(python, workspace, "launch/components.py:evaluate", "--checkpoint", str(run_dir))
    assert evaluated.returncode == 0, evaluated.stderr
    assert "ndcg@10" in evaluated.stderr


def test_a_run_that_fails_fails_the_job(python, workspace, experiment, tmp_path):
    pytest.importorskip("torchx", reason="needs torchx: the extra launch")
    run_dir = tmp_path / "run"
    diverges = [f"run_dir={run_dir}", "optimizer.lr=1e38", "task.l2_norm=false"]
    done = torchx(python, workspace, "launch/components.py:train", "--config", str(experiment), "--", *diverges)
    assert done.returncode == 1
    assert "the run failed at step" in done.stderr and "loss is not finite" in done.stderr
    assert done.stderr.count("step 1/") == 1, "no attempt after the first trains"
