"""benchmarks.gpu from its start to its end where torch, triton, numpy, pyyaml and pydantic are all there is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ROOT

pytest.importorskip("triton", reason="needs triton: the extra dev")

# Every other distribution is hidden from the import system, as if it were not installed.
FEW = """
import runpy, sys
OF_TORCH = "functorch torchgen sympy mpmath filelock fsspec networkx jinja2 markupsafe typing_extensions"
OF_PYDANTIC = "pydantic_core annotated_types typing_inspection"
VISIBLE = {*sys.stdlib_module_names, *OF_TORCH.split(), *OF_PYDANTIC.split()}
VISIBLE |= {"torch", "triton", "numpy", "yaml", "_yaml", "pydantic", "benchmarks", "gr"}

class Few:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        return self.finder.find_spec(name, path, target) if top in VISIBLE or top.startswith("_sysconfig") else None

sys.meta_path[:] = [Few(finder) for finder in sys.meta_path]
sys.argv = ["benchmarks.gpu", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


@pytest.mark.slow
def test_it_runs_whole_with_few_packages(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FEW, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = done.stdout.split("\n\n")[-1]
    assert "correctness: 2 ok, wrong: none" in summary
    assert "tiles: key_gradient, width 64, biased: " in summary
    rows = json.loads(out.read_text())["rows"]
    assert rows.keys() == {"ceilings", "correctness", "tiles", "attention", "softmax", "fixed shape"}


@pytest.mark.slow
def test_a_run_started_again_measures_what_is_left(tmp_path: Path) -> None:
    from benchmarks.gpu import Run

    out = tmp_path / "gpu.json"
    assert Run("cpu", 60.0, out).row("ceilings", "first", lambda: 1) == 1
    late = Run("cpu", 0.0, out)
    assert late.row("ceilings", "first", lambda: 2) == 1
    assert late.row("ceilings", "second", lambda: 2) is None and late.left == 1
    assert Run("cpu", 60.0, out).row("ceilings", "second", lambda: 2) == 2
    out.write_text(json.dumps(json.loads(out.read_text()) | {"of": "another device"}))
    with pytest.raises(SystemExit, match=r"is of another device; this is cpu, .* Remove it, or name another --out"):
        Run("cpu", 60.0, out)


def test_verdicts_name_the_tiles_to_ship() -> None:
    from benchmarks.gpu_tiles import verdicts
    from gr.ops.hstu_attention.triton import Tiles, tiles_on

    shipped, other = tiles_on(90)["forward", 2, 64, False], Tiles(64, 64, 4, 2)
    key = ["forward", 64, False]
    rows = {
        f"{shape} {tiles}": {"key": key, "tiles": list(tiles), "shape": shape, "ms": ms}
        for shape, times in {"short": (1.0, 0.5), "long": (8.0, 8.0)}.items()
        for tiles, ms in zip((shipped, other), times, strict=True)
    }
    line = f"forward, width 64, plain: ship (64, 64, 4, 2), 1.41 times as fast as {tuple(shipped)}"
    assert list(verdicts(rows, 90)) == [line]
    rows = {name: row for name, row in rows.items() if row["tiles"] == list(shipped)}
    assert list(verdicts(rows, 90)) == [f"forward, width 64, plain: keep {tuple(shipped)}"]


class Hopper:
    """The driver of a GPU that is not there: enough to compile for it."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process")
def test_compiling_ahead_compiles_what_is_launched_and_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver

    from benchmarks.gpu_tiles import Inputs, Shape, compiling_ahead
    from gr.ops.hstu_attention import triton as kernels

    monkeypatch.setattr(driver, "_active", Hopper())
    kernels.forward_kernel.device_caches.clear()
    try:
        with compiling_ahead():
            Inputs(Shape("one", (20,), 1, 16, False), "cpu", torch.bfloat16).launch("forward")
        compiled = kernels.forward_kernel.device_caches[0][0]
        assert [type(kernel).__name__ for kernel in compiled.values()] == ["CompiledKernel"]
    finally:
        kernels.forward_kernel.device_caches.clear()
