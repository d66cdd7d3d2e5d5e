"""Every benchmark imports what is there: they run by hand, and so would rot without a word."""

import subprocess
import sys

import pytest

from tests.support import ROOT


@pytest.mark.slow
def test_every_benchmark_imports() -> None:
    names = [f"benchmarks.{path.stem}" for path in sorted((ROOT / "benchmarks").glob("*.py"))]
    assert len(names) > 20
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
