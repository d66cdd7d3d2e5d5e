"""Whole numbers in environment variables."""

import pytest

from gr.environment import whole_number
from gr.errors import ConfigError


def test_the_number_or_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert whole_number("RANK", 0, most=3) == 3 and whole_number("WORLD_SIZE", 1) == 1


@pytest.mark.parametrize("text", ["x", "", "-1", "0", "9", "1.0", " 1", "²", "\u0661", "9" * 5000, "1\n"])
def test_anything_else_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("RANK", text)
    with pytest.raises(ConfigError, match=r"^RANK=.* in the environment: expected a whole number from 1 to 8, .*$"):
        whole_number("RANK", 0, least=1, most=8)
