"""What several unit tests need."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gr.dist import World


@pytest.hookimpl(tryfirst=True)  # before -m selects, and xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker trains served_run and compiles its package, and never for the quick tests."""
    for item in items:
        if "served_run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group("served_run"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> "Iterator[World]":
    """This process as a run of one rank on CPU, with its process group."""
    from gr.dist import world

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with world("cpu") as here:
        yield here


@pytest.fixture(scope="session")
def served_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small click model, of which click_package is a package."""
    from tests.support.served_click import train_click, write_data

    folder = tmp_path_factory.mktemp("click")
    return train_click(write_data(folder / "data"), folder / "run")


@pytest.fixture(scope="session")
def click_package(served_run: Path) -> Path:
    """The package of that model with int8 tables, of which c2's are fp16. Tests copy it before they change it."""
    from gr.config.export import load_export_config
    from gr.serving.export import export

    out = served_run.parent / "package"
    export(served_run, out, load_export_config(["tables.dtype=int8", "tables.own.c2=fp16", "gate.rows=0"]))
    return out
