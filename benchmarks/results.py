"""Rows of a benchmark: as a table to read, and in one CSV to compare machines and days."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compare import Timing

_COLUMNS = (
    *("date", "benchmark", "case", "variant", "seconds", "low", "high", "ratio"),
    *("gflops", "fraction_of_peak", "mebibytes", "machine"),
)


@dataclass(frozen=True)
class Row:
    """rate: useful FLOP/s, 0 if unknown. fraction: of the measured peak. mebibytes: what a call adds, if measured."""

    benchmark: str
    case: str
    variant: str
    seconds: Timing
    ratio: float
    rate: float
    fraction: float
    mebibytes: float | None


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    rated, weighed = any(row.rate for row in rows), any(row.mebibytes is not None for row in rows)
    heads = ["", "ms", "times faster", *["GFLOP/s", "of peak"] * rated, *["MiB"] * weighed]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        spread = f"{row.seconds.median * 1e3:,.1f} [{row.seconds.low * 1e3:,.1f}, {row.seconds.high * 1e3:,.1f}]"
        memory = "" if row.mebibytes is None else f"{row.mebibytes:,.0f}"
        rate = [f"{row.rate / 1e9:,.1f}", f"{row.fraction:.0%}"] * rated
        lines.append([row.variant, spread, f"{row.ratio:.2f}", *rate, *[memory] * weighed])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def append_csv(path: Path, today: str, machine: str, rows: Sequence[Row]) -> None:
    """Rows of the same day, case and variant are replaced."""
    new = [
        {
            **{"date": today, "benchmark": row.benchmark, "case": row.case, "variant": row.variant},
            **{"seconds": f"{row.seconds.median:.6g}", "low": f"{row.seconds.low:.6g}"},
            **{"high": f"{row.seconds.high:.6g}", "ratio": f"{row.ratio:.4g}", "gflops": f"{row.rate / 1e9:.4g}"},
            "fraction_of_peak": f"{row.fraction:.3g}",
            "mebibytes": "" if row.mebibytes is None else f"{row.mebibytes:.1f}",
            "machine": machine,
        }
        for row in rows
    ]
    replaced = {(today, row["benchmark"], row["case"], row["variant"]) for row in new}
    old = []
    if path.exists():
        with path.open(newline="") as file:
            old = [row for row in csv.DictReader(file) if tuple(row[name] for name in _COLUMNS[:4]) not in replaced]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(old + new)
