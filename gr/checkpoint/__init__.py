"""Checkpoints: torch.distributed.checkpoint under a layout that never shows a half-written one."""

from gr.checkpoint.layout import CheckpointFolder, resolve
from gr.checkpoint.resume import resume_from, verify
from gr.checkpoint.store import DENSE, CheckpointStore, ModelState, load_parts, load_state

__all__ = [
    "DENSE",
    "CheckpointFolder",
    "CheckpointStore",
    "ModelState",
    "load_parts",
    "load_state",
    "resolve",
    "resume_from",
    "verify",
]
