"""Held-out labels of one class: a report with null and the reason, never an error after the hours of training."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from gr.cli import main
from gr.config import dump_config
from gr.status import read_status
from tests.support.tiny_histories import tiny_ranking_config, write_histories
from tests.support.tiny_tabular import tiny_click_config, write_tiny_tabular


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")


def rewrite(folder: Path, column: str, change: Callable[[pa.ChunkedArray], pa.Array]) -> None:
    for path in folder.glob("part-*.parquet"):
        table = pq.read_table(path)
        place = table.schema.get_field_index(column)
        changed = change(table[column].combine_chunks())
        pq.write_table(table.set_column(place, table.schema.field(place), changed), path, row_group_size=16)


def masked(lists: pa.ListArray, mask: int) -> pa.ListArray:
    kept = pc.bit_wise_and(lists.flatten(), pa.scalar(mask, pa.int32()))
    offsets = pc.subtract(lists.offsets, lists.offsets[0])
    return pa.ListArray.from_arrays(offsets, kept)


@pytest.mark.slow
@pytest.mark.parametrize(("mask", "missing", "other"), [(0b01, "share", "like"), (0b10, "like", "share")])
@pytest.mark.parametrize("every", [None, 4])
def test_an_action_that_nobody_takes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], mask: int, missing: str, other: str, every: int | None
) -> None:
    write_histories(tmp_path / "data")
    rewrite(tmp_path / "data", "actions", lambda lists: masked(lists, mask))
    (tmp_path / "c.yaml").write_text(
        dump_config(
            tiny_ranking_config(
                tmp_path / "data", run := tmp_path / "run", trainer={"steps": 4}, evaluation={"every": every}
            )
        )
    )
    assert main(["train", str(tmp_path / "c.yaml")]) == 0
    report = json.loads((run / "report.json").read_text())
    assert [report["model"][f"{missing}/{name}"] for name in ("auc", "ne", "calibration")] == [None] * 3
    assert report["model"][f"{missing}/base_rate"] == 0 and report["model"][f"{other}/auc"] is not None
    reason = report["unmeasured"][missing]
    assert f"task '{missing}': all " in reason and " labels are 0, so there is no NE, AUC or calibration" in reason
    assert f"null: {reason}" in capfd.readouterr().out
    assert read_status(run).state == "done"
    assert main(["evaluate", str(run)]) == 0
    shown = capfd.readouterr().out
    assert "null" in shown and f"null: {reason}" in shown


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 6])
def test_clicks_in_every_row(tmp_path: Path, capfd: pytest.CaptureFixture[str], every: int | None) -> None:
    train, test = write_tiny_tabular(tmp_path / "train"), write_tiny_tabular(tmp_path / "test", rows=100)
    rewrite(test, "label", lambda labels: pc.add(pc.multiply(labels, 0), 1).cast(pa.float32()))
    config = tiny_click_config(train, run := tmp_path / "run", evaluation={"path": str(test), "every": every})
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert main(["train", str(tmp_path / "c.yaml")]) == 0
    report = json.loads((run / "report.json").read_text())
    assert (report["model"]["auc"], report["model"]["base_rate"], report["model"]["examples"]) == (None, 1, 100)
    assert report["unmeasured"]["label"].startswith("task 'evaluation': all 100 labels are 1")
    assert f"null: {report['unmeasured']['label']}" in capfd.readouterr().out
    assert read_status(run).state == "done" and main(["evaluate", str(run)]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["auc"] is None for line in lines if line["kind"] == "test")
