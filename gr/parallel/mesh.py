"""The mesh of ranks, by named axes.

Every rank has examples of its own, and the tables are sharded over all ranks. The ranks along the axis `tensor`, which
are neighbours, hold parts of each matrix of the tower together; those along `data` have the same part, or share it.
"""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gr.dist import World

DATA_AXIS, TENSOR_AXIS = "data", "tensor"


def build_mesh(world: World, tensor_parallel: int = 1) -> DeviceMesh:
    """The ranks of the run, with `tensor_parallel` of them along TENSOR_AXIS; without it where that is 1.

    One axis alone has no group of its own: its collectives are the default group's.
    """
    if tensor_parallel > 1:
        shape = (world.size // tensor_parallel, tensor_parallel)
        return init_device_mesh(world.device.type, shape, mesh_dim_names=(DATA_AXIS, TENSOR_AXIS))
    return all_ranks(world.device.type)


def all_ranks(device: str) -> DeviceMesh:
    """The ranks of the default process group along one axis, each with examples of its own."""
    assert dist.group.WORLD is not None, "gr.dist.world makes the process group"
    return DeviceMesh.from_group(dist.group.WORLD, device, mesh_dim_names=(DATA_AXIS,))
