"""Counts that go to disk in runs, and the vocabulary merged from them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.prepare.criteo_rows import Categories
from gr.prepare.criteo_vocabulary import ValueCounts, Vocabulary, write_vocabulary


def test_counts_in_runs_are_the_counts(tmp_path: Path) -> None:
    stream = np.random.default_rng(0)
    values = [stream.zipf(1.3, size=400).astype(np.uint32) for _ in range(30)]
    counts = ValueCounts(tmp_path, ["c1"], entries=300)
    for block in values:
        distinct, codes = np.unique(block, return_inverse=True)
        counts.add([Categories(distinct, codes, np.ones(len(block), dtype=bool))])
    counts.close()
    runs = sorted(tmp_path.glob("run-*"))
    assert len(runs) > 3
    size = write_vocabulary(tmp_path / "c1.parquet", "c1", runs, kind=pa.uint32(), threshold=2, entries=100)
    distinct, occurrences = np.unique(np.concatenate(values), return_counts=True)
    written = pq.read_table(tmp_path / "c1.parquet")
    assert size == written.num_rows == (occurrences >= 2).sum()
    assert pq.read_metadata(tmp_path / "c1.parquet").num_row_groups > 3  # merged range by range
    np.testing.assert_array_equal(written.column("value"), distinct[occurrences >= 2])
    np.testing.assert_array_equal(written.column("count"), occurrences[occurrences >= 2])
    np.testing.assert_array_equal(written.column("id"), np.arange(1, size + 1))
    assert Vocabulary(tmp_path, ["c1"]).cardinalities == [size + 1]
