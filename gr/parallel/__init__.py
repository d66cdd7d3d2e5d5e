"""A single-device model over ranks: tables by a plan, the dense part by a strategy, examples by their load."""
