"""The buckets of an age."""

import torch

from gr.ops.time_encoding import time_bucket


def test_time_buckets() -> None:
    minutes = torch.tensor([-60, 0, 59, 60, 240, 60 * 99, 60 * 10**6])
    assert time_bucket(minutes, "sqrt", 10).tolist() == [0, 0, 0, 1, 2, 9, 9]
    assert time_bucket(torch.tensor([0, 60, 81 * 60, 60 * 10**12]), "log", 64).tolist() == [0, 0, 14, 63]
