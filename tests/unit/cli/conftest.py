"""A small experiment on disk, and `gr` on it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gr.cli import main


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def config(tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a valid configuration of 4 steps, its data beside it."""
    from gr.config import dump_config
    from tests.support.tiny import tiny_config, write_tiny

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(tiny_config(write_tiny(tmp_path / "data"), run_dir, trainer={"steps": 4})))
    return str(path)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(*arguments): the one line that `gr` says, with exit code 2."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        out, err = capfd.readouterr()
        lines = err.splitlines()
        assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), (out, err)
        return lines[0].removeprefix("error: ")

    return run
