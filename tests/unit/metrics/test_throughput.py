"""Rates over the time of the steps."""

from gr.metrics.throughput import Throughput


def test_rates() -> None:
    counted = Throughput()
    counted.add(examples=6, tokens=100, seconds=3.0)
    counted.add(examples=2, tokens=20, seconds=1.0)
    assert counted.read() == {"examples_per_second": 2.0, "tokens_per_second": 30.0}
    counted.add(examples=1, tokens=3, seconds=0.5)
    assert counted.read() == {"examples_per_second": 2.0, "tokens_per_second": 6.0}


def test_nothing_counted_is_no_division_by_zero() -> None:
    assert Throughput().read() == {"examples_per_second": 0.0, "tokens_per_second": 0.0}
