"""Ranks that torchrun starts again find each other, and not the dead ones before them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

# Longer than gloo tries to connect to an address that nobody listens at.
RANK = """
import os, signal, time
import torch, torch.distributed as dist
from gr.dist import world

again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
if again and os.environ["RANK"] == "1":
    time.sleep(10)
with world("cpu") as here:
    total = here.all_reduce_sum([1.0])
    if not again:
        os.kill(os.getpid(), signal.SIGKILL)
    print("met", total, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["0", "1"])
def test_ranks_that_start_at_other_times_after_a_crash(tmp_path: Path, shared: str) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": shared}
    done = subprocess.run([*torchrun, str(script)], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("met [2.0]") == 2
