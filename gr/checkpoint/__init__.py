"""Checkpoints: torch.distributed.checkpoint under a layout that never shows a half-written one."""

from gr.checkpoint.layout import CheckpointFolder, resolve
from gr.checkpoint.store import CheckpointStore, ModelState, load_state, resume_from, verify

__all__ = ["CheckpointFolder", "CheckpointStore", "ModelState", "load_state", "resolve", "resume_from", "verify"]
