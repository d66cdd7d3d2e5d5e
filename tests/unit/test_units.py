"""Numbers as people read them."""

import pytest

from gr.units import count, duration, flops, percent, size, spans


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (80e9, "80.0 GB"),
        (6e12, "6.00 TB"),
        (9.994e9, "9.99 GB"),
        (9.996e9, "10.0 GB"),
        (5e21, "5,000 EB"),
    ],
)
def test_size(value: float, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 s"), (2e-9, "2.00 ns"), (1e-3, "1.00 ms"), (0.9999, "1.00 s"), (75, "75.0 s")]
)
def test_duration(value: float, text: str) -> None:
    assert duration(value) == text


def test_count() -> None:
    assert [count(n) for n in (0, 26, 0.5, 1000, 26.14e9, 1.5e12)] == ["0", "26", "0.50", "1.00 k", "26.1 B", "1.50 T"]
    assert flops(8.2e12) == "8.20 TFLOP"
    assert percent(0.0123) == "1.2 %"


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([0], "0"), ([3, 1, 2, 7], "1-3, 7"), ([5, 6, 9, 10], "5-6, 9-10")]
)
def test_spans(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text
