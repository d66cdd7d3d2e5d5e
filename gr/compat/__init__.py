"""Repairs of defects in the pinned libraries, all in one place. Each one first probes for its defect.

`quiet_known_warnings()` is called once, before a model is sharded, and `divide_only_row_shards` on each collection of
pooled tables after it was. tests/unit/compat fails when a probe stops finding its defect, so that a repair does not
outlive the release that needs it.
"""

import logging
import warnings

from gr.compat.torchrec_means import divide_only_row_shards


def quiet_known_warnings() -> None:
    """Deprecations inside the pinned TorchRec and torch, which their next releases have to mend."""
    for message in ("`broadcast_buffers` is deprecated", "Please use DTensor instead", "Detected mismatched keys"):
        warnings.filterwarnings("ignore", message=message)
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)


__all__ = ["divide_only_row_shards", "quiet_known_warnings"]
