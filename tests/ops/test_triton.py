"""The tests of tests/interpreted, in processes in which Triton interprets its kernels instead of compiling them."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.architecture.source import ROOT

LONGEST = "tests/interpreted/test_hstu_attention.py"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("files", [[LONGEST], ["tests/interpreted", f"--ignore={LONGEST}"]], ids=["longest", "others"])
def test_interpreted(files: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *files,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, env=environment | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped," not in done.stdout, done.stdout[-2000:]
