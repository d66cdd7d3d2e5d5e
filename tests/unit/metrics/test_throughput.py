"""Rates over the time since the last reading, on a clock that the test moves."""

import pytest

from gr.metrics import throughput
from gr.metrics.throughput import Throughput


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    counted = Throughput(since=now[0])
    counted.add(examples=6, tokens=100)
    counted.add(examples=2, tokens=20)
    now[0] += 4
    assert counted.read() == {"examples_per_second": 2.0, "tokens_per_second": 30.0}
    counted.add(examples=1, tokens=3)
    now[0] += 0.5
    assert counted.read() == {"examples_per_second": 2.0, "tokens_per_second": 6.0}
    now[0] += 1
    assert counted.read() == {"examples_per_second": 0.0, "tokens_per_second": 0.0}


def test_no_time_at_all_is_no_division_by_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: 5.0)
    assert Throughput(since=5.0).read()["tokens_per_second"] == 0.0
