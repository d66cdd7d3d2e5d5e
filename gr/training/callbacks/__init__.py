"""Callbacks: everything of a run that has a schedule."""

from gr.training.callbacks.checkpointing import Checkpointing
from gr.training.callbacks.dynamic_ids import DynamicIds
from gr.training.callbacks.evaluation import Evaluation
from gr.training.callbacks.metrics import Metrics
from gr.training.callbacks.prequential import Prequential
from gr.training.callbacks.profiler import Profiler
from gr.training.callbacks.status import Status
from gr.training.callbacks.window_evaluation import WindowEvaluation

__all__ = [
    "Checkpointing",
    "DynamicIds",
    "Evaluation",
    "Metrics",
    "Prequential",
    "Profiler",
    "Status",
    "WindowEvaluation",
]
