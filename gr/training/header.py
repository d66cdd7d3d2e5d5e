"""The first lines of a run's log: the model, the ranks, the steps."""

from collections import Counter

import torch

from gr.config.inventory import TowerDense
from gr.config.run import RunConfig
from gr.dist import World
from gr.ops.backend import backend_for
from gr.planner.placement import Plan
from gr.training.module import TrainModule
from gr.units import count


def header(
    config: RunConfig, module: TrainModule, plan: Plan | None, world: World, *, steps: int, epoch_steps: int
) -> list[str]:
    """The model with its parameters and sharding types, the ranks, and the steps. epoch_steps: those of one epoch.

    May build the C++ operators, as the first step of the run would.
    """
    dense = f"{count(sum(parameter.numel() for parameter in module.dense.values()))} dense parameters"
    trainer, kernels, rounded = config.trainer, "", ""
    if plan is not None:
        tables = plan.inventory.tables
        kinds = Counter(placement.sharding_type for placement in plan.placements)
        sharding = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        dense += f", {count(sum(table.rows * table.dim for table in tables))} in tables ({sharding})"
        rounded = ", ".join(table.name for table in tables if table.dtype != "fp32" and table.rounding == "nearest")
        if isinstance(plan.inventory.dense, TowerDense):
            kernels = f", {backend_for(world.device)} kernels"
    epochs = f"an epoch is {epoch_steps:,}, so {steps / epoch_steps:.3g} epochs"
    lines = [
        f"model: {config.model_phrase}; {dense}",
        f"ranks: {world.size} on {world.device.type}, {trainer.precision}{kernels}",
        f"steps: {steps:,} of {trainer.global_batch_size:,} examples; {epochs}",
    ]
    if world.device.type == "cpu" and trainer.precision == "bf16" and not multiplies_bf16():
        lines.append(
            "precision: this CPU has no bf16 instructions, so bf16 steps take about twice as long as fp32 ones here; "
            "set trainer.precision=fp32"
        )
    if rounded:
        lines.append(
            f"rounding: to nearest, rows of {rounded} lose every update below half a step of fp16; set "
            "embeddings.rounding=stochastic"
        )
    return lines


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers; x86 and ARM name them differently."""
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
