"""Time bucket ids against the formula of the public research code."""

import math

import pytest
import torch

from gr.ops.backend import Backend, force_backend
from gr.ops.hstu_attention import time_bucket_ids


def formula(apart: int, num_buckets: int) -> int:
    return min(math.floor(math.log(max(1, abs(apart))) / 0.301), num_buckets)


@pytest.mark.parametrize("num_buckets", [0, 5, 128, 255])
@pytest.mark.parametrize("ordered", [True, False])
def test_ids_follow_the_formula(backend: Backend, num_buckets: int, ordered: bool) -> None:
    lengths = [4, 0, 1, 7]
    offsets = torch.tensor([0, 4, 4, 5, 12])
    # Differences from none to decades, in both directions.
    timestamps = (torch.rand(12) * 22).exp().long()
    timestamps = timestamps.sort().values if ordered else timestamps
    queries = timestamps.roll(-1)
    with force_backend(backend):
        buckets = time_bucket_ids(timestamps, queries, offsets, num_buckets=num_buckets)
        assert buckets.ids_P.dtype == torch.uint8
    expected = [
        formula(int(queries[start + i] - timestamps[start + j]), num_buckets)
        for start, n in zip(offsets.tolist(), lengths, strict=False)
        for i in range(n)
        for j in range(i + 1)
    ]
    assert buckets.ids_P.tolist() == expected
    assert buckets.pair_offsets_B1.tolist() == [0, 10, 10, 11, 39]


def test_every_edge(backend: Backend) -> None:
    """One second before and at each edge, on both sides of zero."""
    edges = [math.ceil(math.exp(0.301 * k)) for k in range(1, 100)]
    differences = [sign * (edge - back) for edge in edges for back in (0, 1) for sign in (1, -1)]
    queries = torch.tensor(differences)
    with force_backend(backend):
        buckets = time_bucket_ids(
            torch.zeros_like(queries), queries, torch.arange(len(differences) + 1), num_buckets=128
        )
        ids = buckets.ids_P
    assert ids.tolist() == [formula(apart, 128) for apart in differences]


def test_wrong_arguments() -> None:
    times, offsets = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"num_buckets must lie in \[0, 255\], not 256"):
        time_bucket_ids(times, times, offsets, num_buckets=256)
    with pytest.raises(ValueError, match="query_timestamps_T must be int64"):
        time_bucket_ids(times, times.int(), offsets, num_buckets=128)
    with pytest.raises(ValueError, match="end at T = 3"):
        time_bucket_ids(times, times, torch.tensor([0, 2]), num_buckets=128)
