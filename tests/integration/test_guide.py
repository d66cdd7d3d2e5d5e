"""The commands of the pages of docs/ that have any, run as written."""

import os
import re
import shutil
import subprocess

import pytest

from tests.support import ROOT


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


def programs_of(page: str) -> dict[str, str]:
    """The Python of a page, by the file name in its first line."""
    blocks = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return dict(blocks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "least"),
    [
        ("guide.md", 9),
        ("data.md", 7),
        ("launch.md", 5),
        ("recommend.md", 12),
        ("serving.md", 10),
        ("dynamic-ids.md", 3),
        ("checkpoints.md", 7),
        ("scaling.md", 5),
    ],
)
def test_every_command_of_the_page_runs(tmp_path, python, page, least):
    if page == "launch.md":
        pytest.importorskip("torchx", reason="needs torchx: the extra launch")
    if page == "data.md":
        pytest.importorskip("pandas", reason="needs pandas: the extra dev")
    if page == "serving.md":
        pytest.importorskip("uvicorn", reason="needs uvicorn: the extra serve")
        if shutil.which("curl") is None:
            pytest.skip("needs curl")
    assert len(commands(page)) >= least
    for name, text in programs_of(page).items():
        (tmp_path / name).write_text(text)
    for name in ("configs", "docs", "launch", ".torchxconfig"):
        (tmp_path / name).symlink_to(ROOT / name)
    # As a user's activated environment would find them.
    programs = tmp_path / "bin"
    programs.mkdir()
    modules = {"python": "", "gr": "-m gr", "torchrun": "-m torch.distributed.run", "torchx": "-m torchx.cli.main"}
    for name, module in modules.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{python}" {module} "$@"\n')
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHON_EXEC": str(python),
    }
    try:
        for command in commands(page):
            result = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
            assert "Traceback" not in result.stderr
    finally:
        if (server := tmp_path / "serve.pid").exists():
            subprocess.run(["kill", server.read_text().strip()], capture_output=True)  # unless the page did
