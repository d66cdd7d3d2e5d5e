"""Every benchmark imports what is there: they run by hand, and so would rot without a word."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import instruction_sets
from benchmarks.guard import compared
from tests.support import ROOT


@pytest.mark.slow
def test_every_benchmark_imports(python: Path) -> None:
    names = [f"benchmarks.{path.stem}" for path in sorted((ROOT / "benchmarks").glob("*.py"))]
    assert len(names) > 20
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([python, "-c", code, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_instruction_sets() -> None:
    """The widest vectors of the flags, since ratios of one do not hold on another."""
    assert instruction_sets({"sse2", "avx", "avx2", "fma"}) == "AVX2, no bf16, no AMX"
    assert instruction_sets({"avx2", "avx512f", "avx512_bf16", "amx_tile"}) == "AVX-512, bf16, AMX"
    assert instruction_sets({"asimd", "bf16"}) == "NEON, bf16, no AMX"


def test_the_guard_compares_two_trees(capsys: pytest.CaptureFixture[str]) -> None:
    """A tree that answers twice as fast, and one that cannot do the work."""
    fast, slow, lacking = Answers(0.5), Answers(1.0), Answers(None)
    assert compared("planner", slow, fast, 3) == 2.0 and compared("planner", fast, slow, 3) == 0.5
    assert compared("planner", lacking, fast, 3) == float("inf")
    with pytest.raises(SystemExit, match="planner: this tree cannot do it: ImportError"):
        compared("planner", fast, lacking, 3)
    assert compared("train_step", slow, fast, 3) == 2.0
    rows = capsys.readouterr().out
    assert "| planner | 1,000.0 | 500.0 | 2.00 [2.00, 2.00] |" in rows and "2.00], losses within 0.0e+00 |" in rows


class Answers:
    """A Tree whose every case takes `seconds`; None: fails."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    def do(self, name: str) -> dict[str, Any]:
        if self.seconds is None:
            return {"failure": "ImportError: no planner"}
        return {"seconds": self.seconds, "losses": [2.0, 1.0] if name == "train_step" else []}
