"""benchmarks.gpu on a machine that has torch and triton, but neither torchrec nor fbgemm."""

import subprocess
import sys

import pytest

from tests.support import ROOT

pytest.importorskip("triton", reason="needs triton: the extra dev")
WITHOUT = """
import sys
sys.modules |= dict.fromkeys(("torchrec", "fbgemm_gpu", "tensordict", "torchmetrics", "duckdb"))
import benchmarks.gpu
print("imported")
"""


@pytest.mark.slow
def test_it_imports_without_torchrec_and_fbgemm() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "imported\n", result.stderr
