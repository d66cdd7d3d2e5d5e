"""How a single-device model is spread over ranks: tables by a plan, the dense part by a strategy, examples by load."""
