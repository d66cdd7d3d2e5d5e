"""Admission and batches under load, in simulated time: one worker, batches that cost what they cost."""

from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import pytest

from gr.config.serving import EngineConfig
from gr.serving import batch_queue
from gr.serving.batch_queue import BatchQueue, BatchTime, Overloaded, Request


@dataclass(frozen=True)
class Rows:
    rows: int


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(batch_queue, "time", clock)
    return clock


def goodput(clock, qps, *, fixed, row, deadline, rows=8, seconds=30.0, stall=0.0):
    """Requests a second that are answered in time. stall: seconds that every fiftieth batch takes longer."""
    arrivals = list(np.cumsum(np.random.default_rng(0).exponential(1 / qps, int(qps * seconds))))
    queue, in_time, batches = BatchQueue(EngineConfig(deadline_ms=1e3 * deadline, batch_rows=4096)), 0, 0
    clock.now = 0.0
    start = arrivals[0]

    def arrive(until):
        while arrivals and arrivals[0] <= until:
            clock.now = arrivals.pop(0)
            try:
                queue.put(Request(None, Rows(rows), clock.now + deadline, Future(), clock.now))
            except Overloaded:
                continue

    while arrivals or len(queue):
        if not len(queue):
            arrive(arrivals[0])
        batch, _ = queue.take()
        if batch:
            total, began = sum(request.encoded.rows for request in batch), clock.now
            batches += 1
            took = fixed + row * total + (stall if batches % 50 == 0 else 0.0)
            arrive(began + took)
            clock.now = began + took
            queue.time.add(total, took)
            in_time += sum(clock.now <= request.deadline for request in batch)
        elif not len(queue):
            queue._running.clear()
    return in_time / (clock.now - start)


@pytest.mark.parametrize(
    ("fixed", "row", "deadline"),
    [(0.01, 0.0002, 0.06), (0.0, 0.001, 0.06), (0.02, 0.0002, 0.06), (0.001, 0.0002, 0.1)],
)
@pytest.mark.parametrize("stall", [0.0, 0.05])
def test_goodput_stays_under_three_times_the_load(clock, fixed, row, deadline, stall):
    cost = {"fixed": fixed, "row": row, "deadline": deadline, "stall": stall}
    rates = [50.0]
    peak = goodput(clock, rates[-1], **cost)
    while rates[-1] < 20_000:
        rates.append(rates[-1] * 1.5)
        reached = goodput(clock, rates[-1], seconds=2000 / rates[-1], **cost)
        if reached < 0.8 * rates[-1]:
            break
        peak = max(peak, reached)
    peak = max(peak, goodput(clock, rates[-1], seconds=5, **cost))
    assert goodput(clock, 3 * peak, seconds=5, **cost) >= 0.9 * peak


def test_batch_time_finds_fixed_and_row_costs():
    times = BatchTime()
    for rows in (1, 64, 8, 128, 16):
        times.add(rows, 0.002 + 0.0001 * rows)
    assert times.fixed == pytest.approx(0.002) and times.row == pytest.approx(0.0001)
    assert times.of(256, 128) == pytest.approx(2 * 0.002 + 0.0256)
    assert times.rows_within(0.012) == pytest.approx(100)


def test_batch_time_of_one_size():
    times = BatchTime()
    for _ in range(3):
        times.add(10, 0.01)
    assert times.of(10, 128) == pytest.approx(0.01)


def test_a_slow_start_is_forgotten():
    """The first batches of a model may take seconds: it compiles, or its pages are read."""
    time = BatchTime()
    for rows, seconds in ((8, 2.0), (8, 1.5), (16, 0.02), (32, 0.03)):
        time.add(rows, seconds)
    assert time.of(8, 8) < 0.03
    for _ in range(20):
        time.add(8, 0.02)
    time.add(8, 0.001)  # one that is fast is no reason to forget what is known
    assert time.of(8, 8) == pytest.approx(0.02, rel=0.2)


def test_one_stall_does_not_spoil_the_estimate():
    times = BatchTime()
    for _ in range(10):
        times.add(10, 0.01)
    times.add(10, 5.0)
    assert times.of(10, 128) < 0.02


@dataclass(frozen=True)
class ArrayRows:
    values: np.ndarray

    @property
    def rows(self):
        return len(self.values)


def test_of_requests_that_hold_arrays_the_one_that_would_be_late_is_left_out(clock):
    queue = BatchQueue(EngineConfig(deadline_ms=10_000))
    first, hurried, last = (
        Request(None, ArrayRows(np.ones(4)), deadline, Future(), 0.0) for deadline in (10.0, 0.5, 10.0)
    )
    for request in (first, hurried, last):
        queue.put(request)
    queue.time.add(4, 0.4)
    batch, late = queue.take()
    assert [id(request) for request in batch] == [id(first), id(last)] and late == [hurried]
