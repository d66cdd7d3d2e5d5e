"""The mesh of ranks, by named axes.

Today every rank is on the axis `data`: each has a copy of the dense part and examples of its own, and the tables are
sharded over all of them.
"""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gr.dist import World

DATA_AXIS = "data"


def build_mesh(world: World) -> DeviceMesh:
    """The mesh of the default process group, which has no other groups: collectives of its axes are the group's own."""
    assert dist.group.WORLD is not None, "gr.dist.world makes the process group"
    return DeviceMesh.from_group(dist.group.WORLD, world.device.type, mesh_dim_names=(DATA_AXIS,))
