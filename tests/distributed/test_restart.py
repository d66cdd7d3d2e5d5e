"""Ranks that torchrun starts again find each other, and not the dead ones before them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.patience import PATIENCE_SECONDS

# Longer than gloo tries to connect to an address that nobody listens at.
LATE_SECONDS = 10
RANK = f"""
import os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from gr.dist import world

again, rank = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0", os.environ["RANK"]
if again and rank == "1":
    time.sleep({LATE_SECONDS})
with world("cpu") as here:
    total = here.all_reduce_sum([1.0])
    if not again:
        os.kill(os.getpid(), signal.SIGKILL)
    Path(sys.argv[1], f"rank-{{rank}}").write_text(repr(total))
"""
# By whether torchrun shares its store with the ranks, which is what TORCH_DISABLE_SHARE_RDZV_TCP_STORE says.
STORES = {"shared": "0", "apart": "1"}


@pytest.mark.slow
def test_ranks_that_start_at_other_times_after_a_crash(tmp_path: Path, python: Path) -> None:
    """With either store; the two jobs wait for their late ranks at the same time."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    jobs = {}
    for store, apart in STORES.items():
        (tmp_path / store).mkdir()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON_EXEC": str(python)}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = apart
        with (tmp_path / f"{store}.txt").open("w") as log:
            command = [*torchrun, str(script), str(tmp_path / store)]
            jobs[store] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        codes = {store: process.wait(PATIENCE_SECONDS) for store, process in jobs.items()}
    finally:
        for process in jobs.values():
            process.kill()
    logs = "\n".join((tmp_path / f"{store}.txt").read_text() for store in STORES)
    assert codes == dict.fromkeys(STORES, 0), logs
    for store in STORES:
        # A file a rank: what two ranks print may arrive in pieces.
        met = {path.name: path.read_text() for path in (tmp_path / store).iterdir()}
        assert met == {"rank-0": "[2.0]", "rank-1": "[2.0]"}, logs
