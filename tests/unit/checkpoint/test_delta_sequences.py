"""A few of the random sequences of benchmarks/deltas.py, with kills and misuse; in a process that may be forked."""

import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.mark.slow
def test_no_sequence_ends_in_silence(python: Path) -> None:
    command = [python, "-m", "benchmarks.deltas", "--sequences", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "5 sequences: " in done.stdout and "'silent': 0" in done.stdout
