"""The tests of tests/ops/test_sampled_logits.py on the Triton kernels."""

from tests.ops.test_sampled_logits import (
    test_empty,
    test_index_out_of_range,
    test_path_matches_reference,
    test_same_bits_every_time_and_on_two_threads,
    test_views_repeated_indices_and_expanded_gradient,
)

__all__ = [
    "test_empty",
    "test_index_out_of_range",
    "test_path_matches_reference",
    "test_same_bits_every_time_and_on_two_threads",
    "test_views_repeated_indices_and_expanded_gradient",
]
