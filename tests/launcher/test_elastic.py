"""Three hosts train together; one loses power, two go on, it comes back, three finish."""

import sys
import time

import pytest

from tests.launcher import job
from tests.launcher.hosts import Hosts, need_root

pytestmark = pytest.mark.slow
PATIENCE_SECONDS = 540
STEPS = 600
LOSS_TOLERANCE = 1e-4  # summation order, as in gr smoke


class Cluster(Hosts):
    """h1 (rank 0's, with the rendezvous), h2, h3: each an agent of the same elastic job."""

    def launch(self, host: str, workspace, experiment, run_dir) -> None:
        node = ["--nnodes=2:3", "--nproc=1", "--rendezvous=h1", "--id=elastic", "--restarts=5", "--no-preflight"]
        train = ["train", str(experiment), f"run_dir={run_dir}", f"trainer.steps={STEPS}"]
        command = [sys.executable, "-m", "launch.node", *node, *train]
        self.start(host, command, self.log(host), cwd=workspace, env=job.environment())

    def log(self, host: str):
        return self.folder / f"{host}.log"

    def said(self) -> str:
        return "\n".join(self.log(host).read_text() for host in self.others() if self.log(host).exists())

    def until(self, what: str, there) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not there():
            if time.monotonic() > deadline or all(process.poll() is not None for process in self.running("h1")):
                raise AssertionError(f"not {what}:\n{self.said()[-8000:]}")
            time.sleep(0.1)


def test_three_hosts_two_three(workspace, experiment, tmp_path):
    need_root()
    whole = job.undisturbed(workspace, experiment, ranks=1, steps=STEPS)
    run_dir = tmp_path / "run"
    with Cluster(["h1", "h2", "h3"]) as hosts:
        for host in hosts.others():
            hosts.launch(host, workspace, experiment, run_dir)
        hosts.until("training on 3 hosts", lambda: job.status(run_dir).get("step", 0) > job.EVERY)
        assert job.status(run_dir)["world_size"] == 3
        hosts.kill("h3")
        hosts.until("training on 2 hosts", lambda: _world(run_dir) == 2 and job.status(run_dir)["step"] > job.EVERY)
        hosts.launch("h3", workspace, experiment, run_dir)
        hosts.until("training on 3 hosts again", lambda: _world(run_dir) == 3)
        codes = [process.wait(PATIENCE_SECONDS) for host in hosts.others() for process in hosts.running(host)]
        assert codes == [0, 0, 0], hosts.said()[-8000:]
    assert job.status(run_dir)["state"] == "done"
    losses = dict(job.losses(run_dir))
    assert list(losses) == list(range(1, STEPS + 1))
    for step, loss in whole.items():
        assert losses[step] == pytest.approx(loss, rel=LOSS_TOLERANCE), f"step {step}"


def _world(run_dir) -> int:
    return job.status(run_dir).get("world_size", 0)
