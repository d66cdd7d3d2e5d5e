"""Three hosts train together; one loses power, two go on, it comes back, three finish."""

import sys

import pytest

from tests.launcher import job
from tests.launcher.hosts import Hosts, need_root
from tests.launcher.job import HELD, STEPS
from tests.support.gate import gates
from tests.support.patience import PATIENCE_SECONDS, until

pytestmark = pytest.mark.cluster
LOSS_TOLERANCE = 1e-4  # summation order, as in gr smoke


class Cluster(Hosts):
    """h1 (rank 0's, with the rendezvous), h2, h3: each an agent of the same elastic job."""

    def launch(self, host: str, workspace, experiment, run_dir) -> None:
        node = ["--nnodes=2:3", "--nproc=1", "--rendezvous=h1", "--id=elastic", "--restarts=5", "--no-preflight"]
        train = ["train", str(experiment), f"run_dir={run_dir}", *gates(run_dir.parent, HELD)]
        command = [sys.executable, "-m", "launch.node", *node, *train]
        self.start(host, command, self.log(host), cwd=workspace, env=job.environment())

    def log(self, host: str):
        return self.folder / f"{host}.log"

    def output(self) -> str:
        return "\n".join(self.log(host).read_text() for host in self.others() if self.log(host).exists())

    def until(self, what: str, there) -> None:
        def alive() -> bool:
            return any(process.poll() is None for process in self.running("h1"))

        until(what, there, report=lambda: self.output()[-8000:], alive=alive)


def test_three_hosts_two_three(workspace, experiment, tmp_path):
    """The run stands at a gate whenever it gets there; the host that joins, and so stops the ranks, opens it."""
    need_root()
    whole = job.undisturbed(experiment, tmp_path / "whole", ranks=1)
    run_dir = tmp_path / "run"

    def stands_on(size: int) -> bool:
        return job.world_size(run_dir) == size and job.step(run_dir) == HELD - 1

    with Cluster(["h1", "h2", "h3"]) as hosts:
        for host in hosts.others():
            hosts.launch(host, workspace, experiment, run_dir)
        hosts.until("training on 3 hosts", lambda: stands_on(3))
        hosts.kill("h3")
        hosts.until("training on 2 hosts", lambda: stands_on(2))
        hosts.launch("h3", workspace, experiment, run_dir)
        hosts.until("training on 3 hosts again", lambda: job.world_size(run_dir) == 3)
        codes = [process.wait(PATIENCE_SECONDS) for host in hosts.others() for process in hosts.running(host)]
        assert codes == [0, 0, 0], hosts.output()[-8000:]
    assert job.status(run_dir)["state"] == "done"
    losses = dict(job.losses(run_dir))
    assert list(losses) == list(range(1, STEPS + 1))
    for step, loss in whole.items():
        assert losses[step] == pytest.approx(loss, rel=LOSS_TOLERANCE), f"step {step}"
