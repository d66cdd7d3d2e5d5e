"""What several unit tests need."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gr.dist import World


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> "Iterator[World]":
    """This process as a run of one rank on CPU, with its process group."""
    from gr.dist import world

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with world("cpu") as here:
        yield here
