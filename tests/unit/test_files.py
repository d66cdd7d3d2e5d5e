"""Files that are replaced at once."""

import json
from pathlib import Path

import pytest

from gr.files import write_json


def test_a_json_file_is_never_half_written(tmp_path: Path) -> None:
    write_json(tmp_path / "best.json", {"step": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "best.json", {"step": object()})
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 1}
