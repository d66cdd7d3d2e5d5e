"""`gr recommend`: the file it writes, and wrong calls."""

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
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
    os.mkfifo(pipe := tmp_path / "pipe")  # as /dev/full is, no file: a rename would put one in its place
    fault = f"--out={pipe} is no file, so --force does not replace it: name another file"
    assert refused("recommend", "--checkpoint", "x", "--out", str(pipe), "--force") == fault
    assert "out is no folder, so" in refused("embed", "x", "--out", str(out.rename(tmp_path / "out")), "--force")
    assert refused("recommend", "", "--out", str(out)).endswith(
        "is empty: write a value, or leave it out; . is the working folder"
    )


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
    pq.write_table(pa.table({"item_id": [10**6]}), items := tmp_path / "items.parquet")
    assert "items.parquet: names no item of the data" in refused(*call, "--out", other, "--items", str(items))
    (data := tmp_path / "folder").mkdir()
    (data / "schema.json").touch()
    fault = f"out={data}: holds schema.json, so it is no folder of vectors; name another folder"
    assert refused("embed", str(run_dir), "--out", str(data), "--force") == fault
    assert not any(path.name.startswith(".other") for path in tmp_path.iterdir())
