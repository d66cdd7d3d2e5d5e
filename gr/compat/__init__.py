"""Repairs of defects in the pinned libraries, all in one place. Each one first probes for its defect.

`apply()` is called once, before a model is sharded, and `divide_only_row_shards` on each collection of pooled tables
after it was. tests/unit/compat fails when a probe stops finding its defect, so that a repair does not outlive the
release that needs it.
"""

import logging
import warnings

from gr.compat.fbgemm_cpu import dense_sequence_lookup_is_broken, repair_dense_sequence_lookup
from gr.compat.torchrec_means import divide_only_row_shards


def apply() -> None:
    """Applies every repair whose defect is present, and quiets warnings that no user can act on. Idempotent."""
    _quiet_known_warnings()
    if dense_sequence_lookup_is_broken():
        repair_dense_sequence_lookup()


def _quiet_known_warnings() -> None:
    """Deprecations inside the pinned TorchRec and torch, which their next releases have to mend."""
    for message in ("`broadcast_buffers` is deprecated", "Please use DTensor instead", "Detected mismatched keys"):
        warnings.filterwarnings("ignore", message=message)
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)


__all__ = ["apply", "dense_sequence_lookup_is_broken", "divide_only_row_shards"]
