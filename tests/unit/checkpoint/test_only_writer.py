"""The lock of a folder that one process at a time writes."""

from pathlib import Path

import pytest

from gr.checkpoint.only_writer import only_writer
from gr.errors import TransientError


def test_a_second_writer_is_refused_and_drafts_are_gone(tmp_path: Path) -> None:
    for name in (".draft", "kept"):
        (tmp_path / name).mkdir()
    with (
        only_writer(tmp_path, ".d*"),
        pytest.raises(TransientError, match="another gr export or gr publish writes it; wait for its end"),
        only_writer(tmp_path, ".d*"),
    ):
        pass
    assert sorted(each.name for each in tmp_path.iterdir()) == [".lock", "kept"]
    with only_writer(tmp_path, ".d*"):
        pass
