"""A rank that stands still: every rank says where it is, and ends."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from gr import dist as gr_dist
from gr import watchdog
from gr.dist import World
from tests.support.ranks import RankError, run_ranks

LIMITS = {"start": 600.0, "warm": 600.0, "step": 2.0}
HANGS_AT = 3


def forgotten_branch() -> None:
    time.sleep(3600)


def hang_on_rank_1(world: World, logs: Path) -> None:
    watchdog.GRACE_SECONDS = 1.0
    with watchdog.watching(LIMITS, logs, world.rank):
        watchdog.add_detail(gr_dist._collectives)
        for step in range(5):
            # Only the step that hangs has a short limit: a busy machine may take its time for the others.
            watchdog.enter(f"data of step {step}", "step" if step == HANGS_AT else "warm")
            if world.rank == 1 and step == HANGS_AT:
                forgotten_branch()
            watchdog.enter(f"forward of step {step}")
            world.all_reduce_sum([1.0])


def test_every_rank_of_a_hung_run_says_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"exit codes \[1"):
        run_ranks(hang_on_rank_1, 2, tmp_path)
    waiting, late = ((tmp_path / f"stacks-rank-{rank}.txt").read_text() for rank in range(2))
    first = waiting.splitlines()[0]
    assert first.startswith("rank 0 on ") and "is in forward of step 3 for " in first
    assert "(trainer.timeouts.step=2)" in first and "dist.py:" in first and "all_reduce_sum -> " in first
    assert "in collective 4, gloo:all_reduce of [[1]]" in waiting
    assert "is in data of step 3 for " in late and "forgotten_branch" in late
    assert "after collective 3, gloo:all_reduce" in late, "it never came to the fourth"
    entries = json.loads((tmp_path / "collectives-rank-0.json").read_text())["entries"]
    assert [entry["retired"] for entry in entries if "all_reduce" in entry["profiling_name"]][-1] is False


def test_a_process_that_moves_on_is_left_alone(tmp_path: Path) -> None:
    """It takes longer than a limit in all, and each step far less."""
    with watchdog.watching({"start": 2.0, "step": 2.0}, tmp_path / "logs", 0):
        for step in range(25):
            watchdog.enter(f"step {step}", "step")
            time.sleep(0.1)
    assert not (tmp_path / "logs").exists()
    assert all(thread.name != "gr-watchdog" for thread in threading.enumerate())
    watchdog.enter("nobody watches", "step")
    assert not dist.is_initialized()
