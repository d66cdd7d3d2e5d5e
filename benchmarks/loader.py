"""gr's loaders beside plain ones, on generated folders as `gr prepare` writes them.

    python -m benchmarks.loader [--rows 262144] [--users 24000] [--rounds 5] [--folder DIR]

Rows are Criteo's (a label, 13 numbers, 26 columns of Zipf ids), batches of 2,048; users have ML-1M's lengths
(log-normal, 20 to 2,314 events), batches of 128, windows of 200. All take turns; medians of CPU seconds of all threads,
and of the ratios within a round. Before they are measured, the readers' batches are compared.

- plain pyarrow: `iter_batches`, columns as tensors, a KeyedJaggedTensor; nothing is checked, shuffled or resumable
- rows as tuples: torch's DataLoader over an IterableDataset of a pandas frame's tuples
- users by index: torch's DataLoader over a pandas frame of arrays; inputs and targets, padded, and their number
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as MapDataset
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.compare import print_machine
from gr.batch import TabularBatch
from gr.config.histories import HistoryDataConfig
from gr.data.dataset import Dataset
from gr.data.history_batches import HistoryEpochs
from gr.data.loader import ResumableLoader
from gr.data.tabular import TabularDataset
from gr.data.tabular_pass import TabularPass
from gr.prepare.tabular import tabular_table, write_tabular
from gr.prepare.write import Users, write_folder
from gr.schema import DenseTransform, SourceRows, SparseColumn, TabularSchema

DENSE, SPARSE = [f"i{n}" for n in range(1, 14)], [f"c{n}" for n in range(1, 27)]
SIZES = [1000 * 10 ** (n % 4) for n in range(26)]
ROWS, USERS, LENGTH = 2048, 128, 200  # rows and users of a batch, events of a window
SLOW = 1 / 16  # share of the rows that the slowest reader is given


def write_rows(folder: Path, rows: int) -> None:
    random = np.random.default_rng(0)
    schema = TabularSchema(
        format_version=1,
        kind="tabular",
        name="loader",
        labels=["label"],
        dense=DENSE,
        transform=DenseTransform(name="log1p_clip", version=1),
        sparse=[SparseColumn(name=name, cardinality=size) for name, size in zip(SPARSE, SIZES, strict=True)],
        rows=rows,
        threshold=1,
        files=[SourceRows(name="loader", rows=rows, minimum=0)],
        source="benchmarks.loader",
    )
    labels_B = (random.random(rows) < 0.03).astype(np.int8)
    dense = [np.log1p(random.geometric(0.05, rows)).astype(np.float32) for _ in DENSE]
    ids = [np.minimum(random.zipf(1.2, rows), size - 1).astype(np.int32) for size in SIZES]
    write_tabular(folder, schema, [tabular_table(["label", *DENSE, *SPARSE], labels_B, dense, ids)], "rows")


def write_users(folder: Path, users: int) -> None:
    random = np.random.default_rng(0)
    lengths_B = np.clip(np.exp(random.normal(4.56, 1.05, users)), 20, 2314).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths_B)])
    items_T = random.integers(1, 3953, offsets[-1])
    written = Users(np.arange(users), offsets, items_T)
    write_folder(folder, written, corpus=np.arange(1, 3953), name="loader", order="drawn", source="benchmarks.loader")


# --- readers: each yields (examples, something of the batch to compare) ----------------------------------------------

Batches = Iterator[tuple[int, torch.Tensor]]


def gr_rows(folder: Path, shuffle_seed: int | None) -> Batches:
    data = TabularDataset.open(folder)
    rows = TabularPass(data, global_batch_size=ROWS, rank=0, world_size=1, shuffle_seed=shuffle_seed)
    with ResumableLoader[TabularBatch](rows) as loader:
        for batch in loader:
            yield len(batch.labels_B), batch.sparse.values()


def arrow_rows(folder: Path) -> Batches:
    lengths = torch.ones(ROWS * len(SPARSE), dtype=torch.int64)
    for part in sorted(folder.glob("part-*.parquet")):
        for read in pq.ParquetFile(part).iter_batches(ROWS, use_threads=False):
            if read.num_rows < ROWS:
                return
            columns = {name: torch.from_numpy(read.column(name).to_numpy()) for name in ["label", *DENSE, *SPARSE]}
            labels_B = columns["label"].float()
            dense_BN = torch.stack([columns[name] for name in DENSE], 1)
            ids = torch.cat([columns[name] for name in SPARSE]).long()
            sparse = KeyedJaggedTensor(SPARSE, ids, lengths=lengths)
            batch = TabularBatch(dense_BN, sparse, labels_B, 0)
            yield len(batch.labels_B), batch.sparse.values()


def read_frame(folder: Path, columns: list[str] | None = None) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(part, columns=columns) for part in sorted(folder.glob("part-*.parquet"))])


class Tuples(IterableDataset):
    def __init__(self, folder: Path, rows: int) -> None:
        self.frame = read_frame(folder).iloc[:rows]

    def __iter__(self) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
        for row in self.frame.itertuples(index=False):
            yield row[0], np.array(row[1:14], dtype=np.float32), np.array(row[14:], dtype=np.int64)


def tuple_rows(folder: Path, rows: int) -> Batches:
    for labels_B, _, ids_BH in DataLoader(Tuples(folder, rows), batch_size=ROWS, drop_last=True):
        ids = ids_BH.T.reshape(-1)
        lengths = torch.ones(len(ids), dtype=torch.int64)
        yield len(labels_B), KeyedJaggedTensor(SPARSE, ids, lengths=lengths).values()


def gr_users(folder: Path, users: int) -> Batches:
    config = HistoryDataConfig(path=str(folder))
    epochs = HistoryEpochs(Dataset.open(folder), config, seed=0, global_batch_size=USERS, rank=0, world_size=1)
    with ResumableLoader(epochs) as loader:
        for batch in itertools.islice(loader, users // USERS):
            yield USERS, batch.features.values()


class Arrays(MapDataset):
    def __init__(self, folder: Path) -> None:
        self.frame = read_frame(folder, ["item_ids"])

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Inputs and targets, int64 [LENGTH] each, and how many there are."""
        window = self.frame.iloc[index]["item_ids"][:-2][-LENGTH - 1 :]
        padded = np.zeros((2, LENGTH), dtype=np.int64)
        padded[0, : len(window) - 1], padded[1, : len(window) - 1] = window[:-1], window[1:]
        return torch.from_numpy(padded[0]), torch.from_numpy(padded[1]), len(window) - 1


def indexed_users(folder: Path, users: int) -> Batches:
    loader = DataLoader(Arrays(folder), batch_size=USERS, shuffle=True, drop_last=True)
    for items_BN, _, _ in itertools.islice(loader, users // USERS):
        yield USERS, items_BN


# --- measuring -------------------------------------------------------------------------------------------------------


def require_equal(rows: Path, users: Path, count: int) -> None:
    """The readers give the same rows, and the same events over a whole pass."""
    pairs = zip(gr_rows(rows, None), arrow_rows(rows), tuple_rows(rows, 2 * ROWS), strict=False)
    for (_, ours), (_, arrow), (_, tuples) in pairs:
        if not (torch.equal(ours, arrow) and torch.equal(ours, tuples)):
            raise SystemExit("the readers of rows differ, nothing is measured")
    frame = Arrays(users)
    theirs = sum(int(frame[index][0].sum()) for index in range(count))
    with_all = sum(int(items.sum()) for _, items in gr_users(users, count))
    if theirs != with_all:
        raise SystemExit(f"the readers of users differ ({theirs} and {with_all}), nothing is measured")


def cpu_seconds(batches: Batches) -> float:
    """CPU seconds an example, of all threads of this process."""
    began = time.process_time()
    examples = sum(count for count, _ in batches)
    return (time.process_time() - began) / examples


def measure(title: str, readers: dict[str, Callable[[], Batches]], baseline: str, rounds: int) -> None:
    samples: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(rounds + 1):
        for name, read in readers.items():
            seconds = cpu_seconds(read())
            if turn:  # the first turn warms the page cache
                samples[name].append(seconds)
    print(f"\n| {title} | a CPU second | {baseline} = 1 |\n|---|---|---|")
    for name, times in samples.items():
        ratio = statistics.median(base / own for base, own in zip(samples[baseline], times, strict=True))
        print(f"| {name} | {1 / statistics.median(times):,.0f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1 << 18)
    parser.add_argument("--users", type=int, default=24_064)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the data is kept for another run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    print_machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        rows, users = folder / f"rows-{options.rows}", folder / f"users-{options.users}"
        for path, write, count in ((rows, write_rows, options.rows), (users, write_users, options.users)):
            if not path.exists():
                write(path, count)
        count = options.users // USERS * USERS
        require_equal(rows, users, count)
        few = int(options.rows * SLOW)
        of_rows: dict[str, Callable[[], Batches]] = {
            "plain pyarrow": lambda: arrow_rows(rows),
            "gr, file order": lambda: gr_rows(rows, None),
            "gr, shuffled": lambda: gr_rows(rows, 1),
            "rows as tuples": lambda: tuple_rows(rows, few),
        }
        measure("rows", of_rows, "plain pyarrow", options.rounds)
        of_users: dict[str, Callable[[], Batches]] = {
            "users by index": lambda: indexed_users(users, count),
            "gr, shuffled": lambda: gr_users(users, count),
        }
        measure("users", of_users, "users by index", options.rounds)


if __name__ == "__main__":
    main()
