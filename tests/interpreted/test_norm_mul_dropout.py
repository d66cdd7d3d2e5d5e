"""The tests of tests/ops/test_norm_mul_dropout.py on the Triton kernels, and the limit of a GPU."""

import pytest
import torch

from gr.ops.backend import force_backend
from gr.ops.norm_mul_dropout import norm_mul_dropout_linear
from tests.ops.test_norm_mul_dropout import (
    test_few_tokens,
    test_gate_matches_definition,
    test_paths_draw_the_same_mask,
    test_rows_of_a_wider_buffer_and_expanded_gradient,
    test_same_bits_every_time_and_on_two_threads,
)

__all__ = [
    "test_few_tokens",
    "test_gate_matches_definition",
    "test_paths_draw_the_same_mask",
    "test_rows_of_a_wider_buffer_and_expanded_gradient",
    "test_same_bits_every_time_and_on_two_threads",
]


def test_rows_too_wide_for_a_gpu() -> None:
    x = torch.zeros(1, 20000)
    with force_backend("triton"), pytest.raises(ValueError, match="u_TU has 20000 columns"):
        norm_mul_dropout_linear(x, x, torch.zeros(20000, 1), eps=1e-6)
