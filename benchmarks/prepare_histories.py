"""Peak memory and rows a CPU second of `gr prepare kuairand-1k`, `yambda` and `multi-hot`, on generated files.

    python -m benchmarks.prepare_histories [--events 4000000 16000000]

The files have the published layouts, users and items drawn by Zipf's law, times at random, so that no file is sorted by
user. Every run is a process of its own on one core. The peak is the largest resident memory, mapped files included.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from benchmarks.compare import print_machine
from benchmarks.prepare import measure
from gr.prepare.kuairand import ACTIONS, USER_FEATURES
from gr.schema import DenseTransform, SparseColumn, TabularSchema

_USERS, _ITEMS, _CHUNK = 1000, 300_000, 1_000_000
_LOGS = ("log_standard_4_08_to_4_21_1k", "log_standard_4_22_to_5_08_1k", "log_random_4_22_to_5_08_1k")


def _chunks(events: int) -> Iterator[tuple[np.random.Generator, np.ndarray, np.ndarray, np.ndarray]]:
    """(random stream, users, items, milliseconds) of chunks of events."""
    random = np.random.default_rng(0)
    for start in range(0, events, _CHUNK):
        count = min(_CHUNK, events - start)
        users, items = random.zipf(1.1, count) % _USERS, random.zipf(1.1, count) % _ITEMS
        yield random, users, items, random.integers(1_649_376_000_000, 1_652_000_000_000, count)


def write_kuairand(folder: Path, events: int) -> None:
    folder.mkdir()
    counts = {name: (events - events // 50) // 2 for name in _LOGS[:2]} | {_LOGS[2]: events // 50}
    for name, count in counts.items():
        writer = None
        for random, users, items, times in _chunks(count):
            bits = {action: random.integers(0, 2, len(users)) for action in ACTIONS}
            duration = random.integers(1_000, 200_000, len(users))
            columns = {"user_id": users, "video_id": items, "date": np.full(len(users), 20220421)}
            columns |= {"hourmin": np.full(len(users), 400), "time_ms": times, **bits}
            columns |= {"play_time_ms": random.integers(0, 200_000, len(users)), "duration_ms": duration}
            columns |= {"is_rand": np.zeros(len(users), int), "tab": random.integers(0, 15, len(users))}
            table = pa.table(columns)
            writer = writer or csv.CSVWriter(folder / f"{name}.csv", table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
    features = {"user_id": np.arange(_USERS)} | {name: np.arange(_USERS) % 7 for name in USER_FEATURES}
    csv.write_csv(pa.table(features), folder / "user_features_1k.csv")


def write_yambda(folder: Path, events: int) -> None:
    (folder / "flat/50m").mkdir(parents=True)
    writer = None
    for random, users, items, times in _chunks(events):
        heard = random.random(len(users)) < 0.96
        played = pa.array(random.integers(0, 120, len(users)), pa.uint16(), mask=~heard)
        table = pa.table(
            {
                "uid": pa.array(users, pa.uint32()),
                "timestamp": pa.array(times % 26_000_000, pa.uint32()),
                "item_id": pa.array(items + 1, pa.uint32()),
                "is_organic": pa.array(random.integers(0, 2, len(users)), pa.uint8()),
                "played_ratio_pct": played,
                "event_type": pa.array(np.where(heard, "listen", "like")),
            }
        )
        writer = writer or pq.ParquetWriter(folder / "flat/50m/multi_event.parquet", table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    for name in ("artist", "album"):
        mapping = {f"{name}_id": np.arange(_ITEMS) // 7, "item_id": np.arange(1, _ITEMS + 1)}
        pq.write_table(pa.table(mapping), folder / f"{name}_item_mapping.parquet")


def write_tabular(folder: Path, rows: int) -> None:
    folder.mkdir()
    names, writer = [f"c{number}" for number in range(1, 27)], None
    for random, users, _, _ in _chunks(rows):
        columns = {"label": (random.random(len(users)) < 0.03).astype(np.int8)}
        columns |= {"i1": random.random(len(users)).astype(np.float32)}
        columns |= {name: random.integers(0, _ITEMS, len(users)).astype(np.int32) for name in names}
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(folder / "part-00000.parquet", table.schema)
        writer.write_table(table, row_group_size=16384)
    assert writer is not None
    writer.close()
    TabularSchema(
        format_version=1,
        kind="tabular",
        name="generated",
        labels=["label"],
        dense=["i1"],
        transform=DenseTransform(name="log1p_clip", version=1),
        sparse=[SparseColumn(name=name, cardinality=_ITEMS) for name in names],
        rows=rows,
        threshold=1,
        files=[],
        source="benchmarks",
    ).save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[4_000_000, 16_000_000])
    options = parser.parse_args()
    print_machine()
    writers = {"kuairand-1k": write_kuairand, "yambda": write_yambda, "multi-hot": write_tabular}
    for events in options.events:
        for name, write in writers.items():
            count = events if name != "multi-hot" else events // 16
            with tempfile.TemporaryDirectory() as place:
                source, out = Path(place) / "source", Path(place) / "out"
                write(source, count)
                size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
                command = [sys.executable, "-m", "gr", "prepare", name, "--source", str(source), "--out", str(out)]
                run = measure(command)
                shutil.rmtree(out)
                print(
                    f"{name:12s} {count:10d} rows, {size / 1e6:6.0f} MB: {count / run.cpu_seconds:8.0f} rows a CPU "
                    f"second, {run.peak_bytes / 1e6:6.0f} MB at peak",
                    flush=True,
                )


if __name__ == "__main__":
    main()
