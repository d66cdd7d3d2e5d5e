"""What `pip install .` installs: the wheel holds the configurations, the sources of operators and the hardware."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist')"
CHECK = "import gr.config, sys; gr.config.load_config('retrieval/smoke'); print(gr.config.packaged.CONFIGS)"


@pytest.mark.slow
def test_the_wheel_holds_what_a_run_reads(tmp_path):
    for name in ("gr", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, check=True, capture_output=True)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    kinds = (("configs", "*.yaml"), ("configs", "*.json"), ("gr", "*.cpp"), ("gr", "*.h"), ("gr", "*.html"))
    for folder, pattern in kinds:
        for path in (ROOT / folder).rglob(pattern):
            relative = str(path.relative_to(ROOT)).removeprefix("gr/")
            assert f"gr/{relative}" in names
    assert names >= {"gr/planner/hardware.yaml", "gr/py.typed"}
    folder = tmp_path / "site"
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=folder, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(folder / "gr/configs")
