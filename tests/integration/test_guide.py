"""The commands of docs/guide.md, run in order as written."""

import os
import re
import subprocess
import sys

import pytest

from tests.support import ROOT

COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "docs/guide.md").read_text(), re.DOTALL)
    for line in block.strip().splitlines()
]


@pytest.mark.slow
def test_every_command_of_the_guide_runs(tmp_path):
    assert len(COMMANDS) >= 9
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    # `gr` and `torchrun` as a user's activated environment would find them.
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in {"gr": "gr", "torchrun": "torch.distributed.run"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    for command in COMMANDS:
        result = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        assert "Traceback" not in result.stderr
