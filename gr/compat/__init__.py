"""Repairs of defects in the pinned libraries, all in one place. Each one first probes for its defect.

`apply()` is called once, before a model is sharded. tests/unit/compat fails when a probe stops finding its defect, so
that a repair does not outlive the release that needs it.
"""

from gr.compat.fbgemm_cpu import dense_sequence_lookup_is_broken, repair_dense_sequence_lookup


def apply() -> None:
    """Applies every repair whose defect is present. Idempotent."""
    if dense_sequence_lookup_is_broken():
        repair_dense_sequence_lookup()


__all__ = ["apply", "dense_sequence_lookup_is_broken"]
