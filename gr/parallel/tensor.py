"""Tensor parallelism of a Llama tower beside sharded tables.

The ranks of a group hold parts of each matrix, so they must compute on the same tokens; the tables want other examples
on every rank. So the group's ranks join their tokens in front of the tower, and each takes its own out behind it: no id
is looked up twice, and tables and heads see nothing but data parallelism.

T packed tokens of this rank, B its sequences, D width, R ranks of the group.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from gr.config.towers import check_split
from gr.sequence import JaggedSequence
from gr.towers.llama import Llama

SEEDS = 1 << 62


def split_tower(tower: nn.Module | None, mesh: DeviceMesh) -> None:
    """Splits the matrices of a tower over the ranks of `mesh` by heads and hidden columns, and joins their tokens.

    Raises ConfigError for a tower that cannot be split so.
    """
    check_split(tower.config if isinstance(tower, Llama) else None, mesh.size())
    assert isinstance(tower, Llama)
    by_columns = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"
    by_rows = "self_attn.o_proj", "mlp.down_proj"
    for layer in tower.layers:
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in by_columns}
        plan |= {name: RowwiseParallel() for name in by_rows}
        parallelize_module(layer, mesh, plan)
    tower.forward = partial(_forward_joined, tower.forward, mesh.get_group())  # type: ignore[method-assign]


def _forward_joined(
    forward: Callable[[JaggedSequence], JaggedSequence], group: dist.ProcessGroup, own: JaggedSequence
) -> JaggedSequence:
    """forward() of the sequences of all ranks of the group, of which each returns its own. Collective."""
    sizes = torch.tensor([len(own.values_TD), len(own.offsets_B1) - 1, int(torch.randint(SEEDS, ()))])
    tokens, examples, seeds = torch.stack(_gather_equal(sizes.to(own.values_TD.device), group)).T.tolist()
    # What is computed on the same tokens has the same dropout.
    torch.manual_seed(seeds[0])
    lengths = _gather(own.offsets_B1.diff(), examples, group)
    times, next_times = (
        None if x is None else _gather(x, tokens, group) for x in (own.timestamps_T, own.query_timestamps_T)
    )
    targets = None if own.num_targets_B is None else _gather(own.num_targets_B, examples, group)
    values = _Join.apply(own.values_TD, tokens, group)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    joined = JaggedSequence(values, offsets, own.max_length, times, next_times, targets, own.contextual_len)
    return own.with_values(_Own.apply(forward(joined).values_TD, tokens, group))


class _Join(torch.autograd.Function):
    """[T, D] of each rank -> those of all. Backward: the own part times R, since gradients are averaged over ranks."""

    @staticmethod
    def forward(ctx: Any, own_TD: Tensor, tokens: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.tokens, ctx.rank = tokens, dist.get_rank(group)
        return _gather(own_TD, tokens, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.split(ctx.tokens)[ctx.rank] * len(ctx.tokens), None, None


class _Own(torch.autograd.Function):
    """[tokens of all ranks, D] -> this rank's. Backward: those of all ranks over R: the adjoint of _Join."""

    @staticmethod
    def forward(ctx: Any, all_TD: Tensor, tokens: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.tokens, ctx.group = tokens, group
        return all_TD.split(tokens)[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.tokens, ctx.group) / len(ctx.tokens), None, None


def _gather(own: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of every rank, in rank order. sizes: how many each has."""
    padded = own.new_zeros(max(1, *sizes), *own.shape[1:])
    padded[: len(own)] = own
    return torch.cat([part[:size] for part, size in zip(_gather_equal(padded, group), sizes, strict=True)])


def _gather_equal(own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return parts
