"""Callbacks: everything of a run that has a schedule."""

from gr.train.callbacks.checkpointing import Checkpointing
from gr.train.callbacks.evaluation import Evaluation
from gr.train.callbacks.metrics import Metrics
from gr.train.callbacks.prequential import Prequential
from gr.train.callbacks.profiler import Profiler
from gr.train.callbacks.status import Status
from gr.train.callbacks.window_evaluation import WindowEvaluation

__all__ = ["Checkpointing", "Evaluation", "Metrics", "Prequential", "Profiler", "Status", "WindowEvaluation"]
