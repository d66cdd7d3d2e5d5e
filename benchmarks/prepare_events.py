"""`gr prepare events` against pandas on the same log: `python -m benchmarks.prepare_events [--events N]`.

The log is made here: text ids of N/20 users and N/200 items (cubic skew), times in microseconds at random, Parquet with
zstd. Every run is a process of its own on one core, the two take turns, and medians of events a CPU second and of the
peak resident memory are kept. Both do the same: ids in the order of values, events of each user by time, Parquet with a
row a user; the histories are compared.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.compare import print_machine
from benchmarks.prepare import in_turns

_CHUNK = 1 << 20
_PANDAS = """
import sys
import pandas as pd
source, out = sys.argv[1:]
log = pd.read_parquet(source)
log["user_id"], users = pd.factorize(log["u"], sort=True)
log["item_ids"], items = pd.factorize(log["i"], sort=True)
log["user_id"] += 1
log["item_ids"] += 1
log["timestamps"] = log["t"].astype("datetime64[us]").astype("int64") // 1000
log = log[["user_id", "item_ids", "timestamps"]].drop_duplicates()
log = log.sort_values(["user_id", "timestamps"], kind="stable")
histories = log.groupby("user_id", sort=True).agg({"item_ids": list, "timestamps": list}).reset_index()
histories.to_parquet(out, compression="zstd", index=False)
"""


def write_log(path: Path, events: int) -> None:
    stream = np.random.default_rng(0)
    users, items = max(events // 20, 1), max(events // 200, 1)
    schema = pa.schema([("u", pa.string()), ("i", pa.string()), ("t", pa.timestamp("us"))])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for first in range(0, events, _CHUNK):
            size = min(_CHUNK, events - first)
            user_T = np.char.add("user-", stream.integers(0, users, size).astype("U9"))
            item_T = np.char.add("item-", (items * stream.random(size) ** 3).astype(np.int64).astype("U9"))
            time_T = 1_600_000_000_000_000 + stream.integers(0, 10**14, size)
            columns = [pa.array(user_T), pa.array(item_T), pa.array(time_T, pa.timestamp("us"))]
            writer.write_table(pa.table(columns, schema=schema))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        source, ours, theirs = (Path(folder) / name for name in ("log.parquet", "ours", "theirs.parquet"))
        write_log(source, options.events)
        print(f"{options.events:,} events, {source.stat().st_size / 1e6:.0f} MB, {options.rounds} rounds")
        prepare = [sys.executable, "-m", "gr", "prepare", "events"]
        columns = ["--user", "u", "--item", "i", "--time", "t"]
        commands = {
            "gr prepare events": [*prepare, "--source", str(source), *columns, "--out", str(ours)],
            "pandas": [sys.executable, "-c", _PANDAS, str(source), str(theirs)],
        }
        medians = in_turns(commands, options.rounds, ours)
        _compare(ours, theirs)
        for name, run in medians.items():
            rate, peak = options.events / run.cpu_seconds, run.peak_bytes / 2**20
            print(f"{name:20s} {rate:12,.0f} events a CPU second  {peak:8,.0f} MiB at peak")


def _compare(ours: Path, theirs: Path) -> None:
    mine, other = pq.read_table(sorted(ours.glob("part-*.parquet"))), pq.read_table(theirs)
    for name in ("item_ids", "timestamps"):
        values = [table.column(name).combine_chunks().flatten().cast(pa.int64()) for table in (mine, other)]
        if not values[0].equals(values[1]):
            raise RuntimeError(f"column {name} differs between the two")
    print("the same histories from both")


if __name__ == "__main__":
    main()
