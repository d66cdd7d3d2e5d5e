"""Seconds by phase on a CPU; and of a real run, where they and the gradient norm stand in metrics.jsonl."""

import json
import time
from pathlib import Path

import pytest
import torch

from gr.dist import World
from gr.experiment import train
from gr.training.phases import Phases
from tests.support.tiny import tiny_config, write_tiny
from tests.support.tiny_tabular import tiny_click_config, write_tiny_tabular

CPU = torch.device("cpu")


def test_what_lies_between_parts_is_nobodys() -> None:
    phases = Phases(CPU)
    for _ in range(2):
        phases.start()
        time.sleep(0.01)
        phases.end("forward")
        time.sleep(0.05)
        phases.start()
        phases.end("backward")
        time.sleep(0.02)
        phases.end("optimizer")
    seconds = phases.read()
    assert list(seconds) == ["forward_seconds", "backward_seconds", "optimizer_seconds"]
    assert 0.02 <= seconds["forward_seconds"] and seconds["backward_seconds"] < 0.01
    assert 0.04 <= seconds["optimizer_seconds"]
    assert phases.read() == {}


def test_what_nobody_reads_is_not_kept() -> None:
    phases = Phases(CPU, enabled=False)
    phases.start()
    phases.end("forward")
    assert phases.read() == {}


@pytest.mark.slow
def test_of_a_run(tmp_path: Path, alone: World, caplog: pytest.LogCaptureFixture) -> None:
    """Parts of steps are within the steps; MFU only where hardware was named; the header says what runs."""
    data, rows = write_tiny(tmp_path / "data"), write_tiny_tabular(tmp_path / "rows")
    trainer = {"steps": 4, "log_every": 2}
    retrieval = tiny_config(data, tmp_path / "retrieval", trainer=trainer, planner={"topology": "cpu"})
    click = tiny_click_config(rows, tmp_path / "click", trainer=trainer, optimizer={"clip_grad_norm": 1e-3})
    said = {}
    for config in (retrieval, click):
        caplog.clear()
        with caplog.at_level("INFO", logger="gr"):
            train(config, alone)
        said[config.run_dir] = caplog.text
        lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["kind"] == "train"]
        assert len(steps) == 2
        for line in steps:
            parts = sum(line[f"{name}_seconds"] for name in ("data_wait", "forward", "backward", "optimizer"))
            assert 0 < parts <= 2 * config.trainer.global_batch_size / line["examples_per_second"]
            assert line["gradient_norm"] > 1e-3 and line["flops_per_second"] > 0 and line["peak_host_bytes"] > 10**8
            assert ("mfu" in line) == (config is retrieval)
    assert "model: retrieval, hstu of" in said[retrieval.run_dir] and "native kernels" in said[retrieval.run_dir]
    assert "model: click, dlrm with dot interaction, width 8;" in said[click.run_dir]
    assert "ranks: 1 on cpu, fp32\n" in said[click.run_dir]
    assert "steps: 4 of 24 examples; an epoch is 12, so 0.333 epochs" in said[click.run_dir]
