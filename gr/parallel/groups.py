"""Groups of ranks that each have the tables whole, and average them now and then (2D, as TorchRec's DMPCollection).

A group updates its copy by the examples of its own ranks, whose loss is averaged over the group alone: a mean over the
groups of steps of SGD is the step by the mean over all ranks. DMPCollection itself runs on GPUs only, and averages the
states of Adagrad and no others.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingEnv2D

from gr.embeddings import TableOptimizer
from gr.embeddings.init import key_of
from gr.ops.row_update import StochasticRounding

BLOCK = 1 << 22  # elements that are averaged at once


def sharding_env(groups: int, device: torch.device) -> ShardingEnv:
    """The ranks over which TorchRec shards tables: all, or this rank's group of neighbours. Collective."""
    world = dist.group.WORLD
    assert world is not None, "gr.dist.world makes the process group"
    if groups == 1:
        return ShardingEnv.from_process_group(world)
    ranks = torch.arange(dist.get_world_size()).view(groups, -1)
    mesh = DeviceMesh(device.type, ranks, mesh_dim_names=("replicate", "shard"))
    return ShardingEnv2D(
        global_pg=world,
        sharding_pg=mesh.get_group("shard"),
        replica_pg=mesh.get_group("replicate"),
        device_mesh=mesh,
        node_group_size=min(ranks.shape[1], get_local_size(ranks.numel())),
        use_inter_host_allreduce=True,  # neighbours are a group
    )


def copies_of(model: torch.nn.Module) -> dist.ProcessGroup | None:
    """The ranks that hold the same shards as this one, of a sharded model; None where each is held once."""
    env = model._env if isinstance(model, DistributedModelParallel) else None
    return env.replica_pg if isinstance(env, ShardingEnv2D) else None


class TableCopies:
    """Averages the copies of a rank's shards, weights and optimizer states, every `interval` steps.

    Sums are exact for copies that are equal, so rows that no group has moved stay. Half weights are rounded as their
    updates are, which makes their mean exact too.
    """

    def __init__(self, tables: TableOptimizer, group: dist.ProcessGroup, interval: int) -> None:
        self._tables, self._group, self._interval = tables, group, interval
        self._count = dist.get_world_size(group)
        self._averaged = 0  # steps of the tables when they last were

    def after_step(self) -> None:
        """Averages where it is due. Collective."""
        if self._tables.steps % self._interval == 0:
            self.agree()

    @torch.no_grad()
    def agree(self) -> None:
        """Averages, unless no step came since. Collective."""
        if self._averaged == self._tables.steps:
            return
        self._averaged = self._tables.steps
        self._tables.flush()
        for shard, states in zip(self._tables.shards, self._tables.states, strict=True):
            if shard.replicated:  # every rank has it, and they agree
                continue
            key = key_of(self._tables.seed, f"averaging/{shard.table}")
            draws = StochasticRounding(key, self._averaged, shard.row_offset, shard.column_offset, shard.shape[1])
            self._average(shard.weight, draws if self._tables.rounds(shard) else None)
            for state in states.values():
                self._average(state, None)
        self._tables.reload()

    def _average(self, tensor: Tensor, draws: StochasticRounding | None) -> None:
        """tensor: [r, c] or [r]. draws: of the rounding of a half weight; None rounds to nearest."""
        # A third of three times a number is that number in float64, not in float32.
        wide = torch.float32 if self._count & (self._count - 1) == 0 else torch.float64
        rows = max(1, BLOCK // max(1, tensor[:1].numel()))
        for start in range(0, len(tensor), rows):
            block = tensor[start : start + rows]
            mean = block.to(wide)
            dist.all_reduce(mean, group=self._group)
            mean /= self._count
            if draws is not None:
                mean = draws(mean.float(), torch.arange(start, start + len(block), device=block.device), block.dtype)
            block.copy_(mean)
