"""Sharding plans: memory and step time of a model on a number of ranks, and the best placement of its tables.

The core needs numpy and scipy only; torch is imported by `for_run` and `sharding_plan` alone, so this imports nothing.
"""
