"""`gr prepare criteo` against pandas on the same rows: `python -m benchmarks.prepare --pandas PYTHON [--rows N]`.

PYTHON is an interpreter with pandas and pyarrow, which gr's own environment does not hold: make one with
`python -m venv DIR && DIR/bin/pip install pandas pyarrow`.

The rows are made here: Criteo's 40 columns, sizes and skew of the public rows, 5 % of the categories and 20 % of the
counts missing. Every run is a process of its own on one core, the two take turns, and medians of rows a CPU second and
of the peak resident memory are kept. Both do the same: count the values, give each an id in the order of values, take
log1p, write Parquet; the ids are compared.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.compare import print_machine

_SIZES = [1000, 500, 10**6, 300000, 300, 20, 10000, 600, 3, 40000, 5000, 800000, 3000]
_SIZES += [26, 8000, 500000, 10, 4000, 2000, 4, 700000, 17, 15, 100000, 90, 60000]
_CHUNK = 50_000
_PANDAS = """
import sys
import numpy as np, pandas as pd
source, out = sys.argv[1:]
dense, sparse = [f"i{n}" for n in range(1, 14)], [f"c{n}" for n in range(1, 27)]
kinds = {"label": "int8"} | dict.fromkeys(dense, "float64") | dict.fromkeys(sparse, "str")
frame = pd.read_csv(source, sep="\\t", header=None, names=list(kinds), dtype=kinds)
for name in dense:
    frame[name] = np.log1p(frame[name].fillna(0).clip(lower=0)).astype("float32")
for name in sparse:
    counts = frame[name].value_counts()
    values = counts.index[counts >= 1].sort_values()
    ids = pd.Series(np.arange(1, len(values) + 1), index=values)
    frame[name] = frame[name].map(ids).fillna(0).astype("int32")
frame.to_parquet(out, compression="zstd", index=False)
"""


@dataclass(frozen=True)
class Run:
    """cpu_seconds: user and system time. peak_bytes: largest resident memory."""

    cpu_seconds: float
    peak_bytes: float


def write_rows(path: Path, rows: int) -> None:
    stream = np.random.default_rng(0)
    with path.open("w", encoding="ascii") as file:
        for start in range(0, rows, _CHUNK):
            columns = list(_columns(stream, min(_CHUNK, rows - start)))
            file.writelines("\t".join(row) + "\n" for row in zip(*columns, strict=True))


def _columns(stream: np.random.Generator, rows: int) -> Iterator[list[str]]:
    yield (stream.random(rows) < 0.03).astype(int).astype(str).tolist()
    for _ in range(13):
        counts = np.minimum(stream.pareto(0.7, rows) * 3, 1e6).astype(np.int64).astype(str)
        yield np.where(stream.random(rows) < 0.2, "", counts).tolist()
    for size in _SIZES:
        values = (stream.zipf(1.2, rows) % size).astype(np.uint64) * 2654435761 % 2**32
        hexadecimal = np.char.mod("%08x", values)
        yield np.where(stream.random(rows) < 0.05, "", hexadecimal).tolist()


def measure(command: Sequence[str]) -> Run:
    """Run on one core, the highest that this process may use."""
    core = max(os.sched_getaffinity(0))
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=lambda: os.sched_setaffinity(0, {core})
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command[0]} failed with status {status}")
    return Run(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def in_turns(commands: Mapping[str, Sequence[str]], rounds: int, folder: Path) -> dict[str, Run]:
    """Medians of each command over rounds in which they take turns. folder: what one writes, removed before a round."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        shutil.rmtree(folder, ignore_errors=True)
        for name, command in commands.items():
            runs[name].append(measure(command))
    return {
        name: Run(
            statistics.median(run.cpu_seconds for run in measured),
            statistics.median(run.peak_bytes for run in measured),
        )
        for name, measured in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pandas", required=True, metavar="PYTHON", help="interpreter with pandas and pyarrow")
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print_machine()
    version = "import pandas, pyarrow; print('pandas', pandas.__version__, 'with pyarrow', pyarrow.__version__)"
    if subprocess.run([options.pandas, "-c", version], check=False).returncode:
        sys.exit(f"{options.pandas} has no pandas with pyarrow: pip install pandas pyarrow there")
    with tempfile.TemporaryDirectory() as folder:
        source, ours, theirs = (Path(folder) / name for name in ("train.txt", "ours", "theirs.parquet"))
        write_rows(source, options.rows)
        print(f"{options.rows} rows, {source.stat().st_size / 1e6:.0f} MB, {options.rounds} rounds")
        prepare = [sys.executable, "-m", "gr", "prepare", "criteo"]
        commands = {
            "gr prepare criteo": [*prepare, "--source", str(source), "--out", str(ours)],
            "pandas": [options.pandas, "-c", _PANDAS, str(source), str(theirs)],
        }
        medians = in_turns(commands, options.rounds, ours)
        _compare(ours, theirs)
        for name, run in medians.items():
            rate, peak = options.rows / run.cpu_seconds, run.peak_bytes / 1e6
            print(f"{name:20s} {rate:10.0f} rows a CPU second  {peak:8.0f} MB at peak")


def _compare(ours: Path, theirs: Path) -> None:
    mine, other = pq.read_table(sorted(ours.glob("part-*.parquet"))), pq.read_table(theirs)
    for name in mine.column_names:
        if not np.allclose(mine.column(name).to_numpy(), other.column(name).to_numpy(), rtol=1e-6):
            raise RuntimeError(f"column {name} differs between the two")
    print("the same labels, features and ids from both")


if __name__ == "__main__":
    main()
