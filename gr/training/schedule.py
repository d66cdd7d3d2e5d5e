"""Learning-rate schedules as functions of the step, so that nothing of them needs to be saved."""

import math

from gr.config.optim import ScheduleConfig

SHAPES = {
    "linear": lambda progress: 1 - progress,
    "quadratic": lambda progress: (1 - progress) ** 2,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


def rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Factor on the peak rate for step `step` (0-based) of `steps`: linear warm-up, the peak, then the shape."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    begin = config.warmup_steps + config.hold_steps
    if config.kind == "constant" or step < begin:
        return 1.0
    progress = (step - begin) / max(1, steps - begin)
    shape = SHAPES[config.kind](progress)
    return config.final_fraction + (1 - config.final_fraction) * shape
