"""metrics.jsonl and trackers get the same numbers; a run goes on when a tracker does not take them."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gr.metrics.trackers import TensorBoard, Tracker
from gr.metrics.writers import MetricsWriter
from tests.support.tiny import tiny_config


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_time(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def test_both_files(tmp_path: Path) -> None:
    run_dir = tmp_path / "not" / "there"
    config = tiny_config(tmp_path, run_dir)
    writer = MetricsWriter(run_dir, trackers=[TensorBoard(config.trainer.writers[0], config, 0)])
    writer.write(2, "train", {"loss": 4.5})
    writer.write(2, "validation", {"hr@10": 0.25, "mrr": 0.125})
    writer.write(4, "train", {"loss": 4.0})
    writer.close()
    assert without_time(lines(run_dir)) == [
        {"step": 2, "kind": "train", "loss": 4.5},
        {"step": 2, "kind": "validation", "hr@10": 0.25, "mrr": 0.125},
        {"step": 4, "kind": "train", "loss": 4.0},
    ]
    times = [record["time"] for record in lines(run_dir)]
    assert times == sorted(times)
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["train/loss", "validation/hr@10", "validation/mrr"]
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(2, 4.5), (4, 4.0)]


def test_a_line_is_on_disk_at_once(tmp_path: Path) -> None:
    """A killed run keeps what it has written."""
    writer = MetricsWriter(tmp_path)
    writer.write(1, "train", {"loss": 1.0})
    assert without_time(lines(tmp_path)) == [{"step": 1, "kind": "train", "loss": 1.0}]
    writer.close()


def test_a_resumed_run_appends_and_drops_what_it_will_run_again(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, "train", {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')  # as a kill may leave it
    writer = MetricsWriter(tmp_path, steps_done=2)
    writer.write(3, "train", {"loss": 9.0})
    writer.close()
    assert [(record["step"], record["loss"]) for record in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_a_run_from_the_start_starts_its_metrics_anew(tmp_path: Path) -> None:
    for _ in range(2):
        writer = MetricsWriter(tmp_path)
        writer.write(1, "train", {"loss": 1.0})
        writer.close()
    assert [record["step"] for record in lines(tmp_path)] == [1]


@pytest.mark.parametrize(
    "garbage", [b"{\n", b"null\n", b"\x00\x00\x00\n", b'{"kind": "train"}\n', b'{"step": "3"}\n', b"\xff\n"]
)
def test_lines_that_are_no_records_are_left_out_of_a_resumed_run(tmp_path: Path, garbage: bytes) -> None:
    first, second = b'{"step": 1, "kind": "train", "loss": 3.0}\n', b'{"step": 2, "kind": "train", "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(first + garbage + second)
    writer = MetricsWriter(tmp_path, 2)
    writer.write(3, "train", {"loss": 1.0})
    writer.close()
    assert [(record["step"], record["loss"]) for record in lines(tmp_path)] == [(1, 3.0), (2, 2.0), (3, 1.0)]


class Unreachable(Tracker):
    faults = (OSError,)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        raise ConnectionRefusedError("no server")

    def close(self) -> None:
        raise ConnectionRefusedError("no server")


def test_a_tracker_out_of_reach_loses_records_and_not_the_run(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, trackers=[Unreachable()])
    for step in (1, 2):
        writer.write(step, "train", {"loss": 1.0})
    writer.close()
    assert [record["step"] for record in lines(tmp_path)] == [1, 2] and writer.lost == 2
