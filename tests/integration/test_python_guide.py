"""The Python of docs/python.md, run in order as written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gr
from tests.support import ROOT


@pytest.mark.slow
def test_every_block_of_the_page_runs(tmp_path: Path, python: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    assert len(blocks) >= 10
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "page.py").write_text("\n".join(blocks))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    sizes = ["--records", "400", "--items", "200", "--categories", "10", "--length", "40"]
    prepare = ["-m", "gr", "prepare", "synthetic", "--out", "data/synthetic", *sizes]
    for command in (prepare, ["page.py"]):
        done = subprocess.run([python, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_importing_gr_costs_no_torch(tmp_path: Path) -> None:
    lazy = (
        "import sys, gr; heavy = {'torch', 'numpy', 'pyarrow', 'pydantic'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", lazy], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_stub_has_every_public_name() -> None:
    stub = (ROOT / "gr/__init__.pyi").read_text()
    assert sorted(re.findall(r"^from \S+ import \w+ as (\w+)$", stub, re.MULTILINE)) == sorted(gr.__all__)
