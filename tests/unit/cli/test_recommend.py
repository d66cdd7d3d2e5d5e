"""`gr recommend`: the file it writes, and wrong calls."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gr.cli import main

Refused = Callable[..., str]


def test_wrong_calls(refused: Refused, run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "top.parquet"
    assert refused("recommend", "--out", str(out)).startswith("which checkpoint?")
    assert refused("recommend", "--checkpoint", str(run_dir), "--out", str(out)).startswith(f"{run_dir}: no checkpoint")
    assert "there is no folder" in refused(
        "recommend", "--checkpoint", "x", "--out", str(tmp_path / "none/top.parquet")
    )
    out.touch()
    assert "exists: name another file" in refused("recommend", "--checkpoint", "x", "--out", str(out))


@pytest.mark.slow
def test_after_training(
    config: str, run_dir: Path, tmp_path: Path, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    out, call = tmp_path / "top.parquet", ["recommend", "--checkpoint", str(run_dir)]
    assert main(["train", config]) == 0
    capfd.readouterr()
    assert main([*call, "--out", str(out), "--k", "3"]) == 0
    assert f"{out}: 288 rows, 96 users" in capfd.readouterr().out
    rows = pq.read_table(out)
    assert rows.column_names == ["user_id", "item_id", "score", "place"] and len(rows) == 288
    other = str(tmp_path / "other.parquet")
    assert refused(*call, "--out", other, "--k", "61") == "k=61: 60 items may be recommended; set k to 1 up to that"
    assert "no such folder" in refused(*call, "--out", other, f"evaluation.path={tmp_path}/none")
    assert not any(path.name.startswith(".other") for path in tmp_path.iterdir())
