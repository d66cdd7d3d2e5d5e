"""Numbers in three digits with SI prefixes: 1 GB is 1e9 bytes."""

from collections.abc import Iterable
from itertools import pairwise

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_COUNTS = ("", "k", "M", "B", "T", "Q")


def scaled(value: float, prefixes: tuple[str, ...]) -> tuple[str, str]:
    """`value` in the largest of `prefixes`, powers of 1,000, that leaves it at 1 or above."""
    power = 0
    # 999.5 is written 1.00 of the next prefix.
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value /= 1000
        power += 1
    return three_digits(value), prefixes[power]


def three_digits(value: float) -> str:
    if value == 0:
        return "0"
    for limit, decimals in ((9.995, 2), (99.95, 1)):
        if abs(value) < limit:
            return f"{value:.{decimals}f}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes with a unit: 80.0 GB."""
    if abs(value) < 999.5:
        return f"{value:.0f} B"
    text, prefix = scaled(value, _PREFIXES)
    return f"{text} {prefix}B"


def flops(value: float) -> str:
    text, prefix = scaled(value, _PREFIXES)
    return f"{text} {prefix}FLOP"


def count(value: float) -> str:
    """A count with a short-scale prefix: 1.50 T, 26.1 B."""
    if abs(value) < 999.5 and value == int(value):
        return f"{value:.0f}"
    text, prefix = scaled(value, _COUNTS)
    return f"{text} {prefix}".strip()


def duration(seconds: float) -> str:
    """Seconds with a unit: 12.3 ms."""
    for unit, power in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= 0.9995 * power:
            return f"{three_digits(seconds / power)} {unit}"
    return "0 s" if seconds == 0 else f"{three_digits(seconds / 1e-9)} ns"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def spans(numbers: Iterable[int]) -> str:
    """Sorted integers with runs written as spans: 0-7, 12."""
    ordered = sorted(numbers)
    starts = [b for a, b in pairwise([-2, *ordered]) if b != a + 1]
    ends = [a for a, b in pairwise([*ordered, -2]) if b != a + 1]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
