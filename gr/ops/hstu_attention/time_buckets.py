"""Logarithmic buckets of the time between a query and a key. T tokens, B examples, P pairs (query i, key j <= i)."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gr.ops.backend import backend_for
from gr.ops.jagged import check_offsets

BUCKET_WIDTH = 0.301  # in ln(seconds): a bucket spans a factor of 1.35
MAX_BUCKETS = 255  # ids are uint8
_LARGEST_INT64, _LARGEST_INT32 = 2**63 - 1, 2**31 - 1


@dataclass(frozen=True)
class TimeBuckets:
    """The times of a batch, for all layers and heads. Each derived tensor is computed once, when it is first used.

    timestamps_T, query_timestamps_T: int64 seconds. offsets_B1: int64. num_buckets: ids lie in [0, num_buckets].
    """

    timestamps_T: Tensor
    query_timestamps_T: Tensor
    offsets_B1: Tensor
    num_buckets: int

    @functools.cached_property
    def pair_offsets_B1(self) -> Tensor:
        """int64: the start of each sequence's pairs in ids_P."""
        lengths_B = self.offsets_B1.diff()
        return torch.nn.functional.pad((lengths_B * (lengths_B + 1) // 2).cumsum(0), (1, 0))

    @functools.cached_property
    def ids_P(self) -> Tensor:
        """uint8, P = sum of n (n + 1) / 2 over sequences of length n: the id of every visible pair.

        The id of query i and key j <= i of sequence b is element pair_offsets_B1[b] + i (i + 1) / 2 + j.
        """
        edges = torch.tensor(bucket_edges(self.num_buckets), dtype=torch.int64, device=self.timestamps_T.device)
        if backend_for(self.timestamps_T.device) != "native":
            return _bucket_ids(self.timestamps_T, self.query_timestamps_T, self.offsets_B1, edges)
        times = (self.timestamps_T.contiguous(), self.query_timestamps_T.contiguous())
        return torch.ops.gr.time_bucket_ids(*times, self.offsets_B1.contiguous(), self.pair_offsets_B1, edges)

    @functools.cached_property
    def seconds(self) -> tuple[Tensor, Tensor, Tensor]:
        """The int32 inputs of kernels that compute ids themselves: query_timestamps_T and timestamps_T as seconds since
        the earliest of the batch, and the smallest difference of each bucket, with an unreachable one at the end.

        Raises ValueError if the times of the batch span 68 years or more; on a GPU such times stop the device instead.
        """
        times = torch.stack([self.query_timestamps_T, self.timestamps_T])
        if times.numel():
            times = times - times.min()
            if times.device.type != "cpu":
                torch._assert_async((times.max() < _LARGEST_INT32).all(), "timestamps of a batch span 68 years or more")
            elif int(times.max()) >= _LARGEST_INT32:
                raise ValueError(f"timestamps of a batch span {int(times.max())} seconds, 68 years or more")
        edges = [0, *(min(edge, _LARGEST_INT32) for edge in bucket_edges(self.num_buckets)), _LARGEST_INT32]
        query_times_T, key_times_T = times.int().unbind()
        return query_times_T, key_times_T, torch.tensor(edges, dtype=torch.int32, device=times.device)


def time_bucket_ids(
    timestamps_T: Tensor, query_timestamps_T: Tensor, offsets_B1: Tensor, *, num_buckets: int
) -> TimeBuckets:
    """bucket(i, j) = min(floor(ln(max(1, |query_timestamp_i - timestamp_j|)) / 0.301), num_buckets) for j <= i.

    timestamps_T, query_timestamps_T: int64 seconds [T], the times of the event and of the prediction of its successor.
    offsets_B1: int64 [B + 1]. num_buckets: 0 to 255; the bias table has num_buckets + 1 entries.
    Ids come from comparing integers with the edges of the buckets, so every device and path gives the same ids; the
    edges are exact up to 10^6 years.
    Raises ValueError if shapes, dtypes or num_buckets do not fit.
    Source: Zhai et al. 2024 (arXiv 2402.17152), App. A rab^t, with the bucket function of the public research code.
    """
    if not 0 <= num_buckets <= MAX_BUCKETS:
        raise ValueError(f"num_buckets must lie in [0, {MAX_BUCKETS}], not {num_buckets}")
    tokens = timestamps_T.shape[0]
    for name, value in (("timestamps_T", timestamps_T), ("query_timestamps_T", query_timestamps_T)):
        if value.dtype != torch.int64 or value.shape != (tokens,):
            raise ValueError(f"{name} must be int64 of shape [{tokens}], not {value.dtype} of {list(value.shape)}")
    check_offsets(offsets_B1, tokens, max_length=tokens)
    return TimeBuckets(timestamps_T, query_timestamps_T, offsets_B1, num_buckets)


@functools.cache
def bucket_edges(num_buckets: int) -> tuple[int, ...]:
    """The smallest difference in seconds of each bucket from 1 on. Edges past the int64 range are never reached."""
    return tuple(min(math.ceil(math.exp(BUCKET_WIDTH * k)), _LARGEST_INT64) for k in range(1, num_buckets + 1))


def _bucket_ids(timestamps_T: Tensor, query_timestamps_T: Tensor, offsets_B1: Tensor, edges: Tensor) -> Tensor:
    """ids_P, query by query: the keys of query i of a sequence are its first i + 1 tokens."""
    tokens = timestamps_T.shape[0]
    token_T = torch.arange(tokens, device=timestamps_T.device)
    start_T = torch.repeat_interleave(offsets_B1[:-1], offsets_B1.diff(), output_size=tokens)
    keys_T = token_T - start_T + 1
    query_P = torch.repeat_interleave(token_T, keys_T)
    row_start_T = keys_T.cumsum(0) - keys_T
    key_P = torch.arange(query_P.numel(), device=query_P.device) + (start_T - row_start_T)[query_P]
    seconds_P = (query_timestamps_T[query_P] - timestamps_T[key_P]).abs()
    return torch.bucketize(seconds_P, edges, right=True).to(torch.uint8)
