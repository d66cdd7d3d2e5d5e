"""Learning-rate schedules as functions of the step, so that nothing of them needs to be saved."""

import math

from gr.config.tree import ScheduleConfig


def rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Factor on the peak rate for step `step` (0-based) of `steps`: linear warm-up, then the configured shape."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    shape = 1 - progress if config.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_fraction + (1 - config.final_fraction) * shape
