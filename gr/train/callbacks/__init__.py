"""Callbacks: everything of a run that has a schedule."""

from gr.train.callbacks.checkpointing import Checkpointing
from gr.train.callbacks.evaluation import Evaluation
from gr.train.callbacks.metrics import Metrics
from gr.train.callbacks.next_window import NextWindow
from gr.train.callbacks.profiler import Profiler
from gr.train.callbacks.progressive import Progressive
from gr.train.callbacks.status import Status

__all__ = ["Checkpointing", "Evaluation", "Metrics", "NextWindow", "Profiler", "Progressive", "Status"]
