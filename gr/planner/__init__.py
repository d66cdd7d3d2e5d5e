"""Where tables go and what it costs: memory and step time of a model on a number of ranks, and the best plan for it.

The core reads numpy and scipy only, so this imports nothing: torch is loaded by `run`, `sharding_plan` and `torchrec`.
"""
