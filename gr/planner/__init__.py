"""Where tables go: a TorchRec sharding plan for a model on meta and a number of ranks."""

from gr.planner.torchrec import make_plan

__all__ = ["make_plan"]
