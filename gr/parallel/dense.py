"""The dense part of a model over ranks: materialised and replicated."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module

from gr.models import dense
from gr.parallel.mesh import DATA_AXIS


def parallelise_dense(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """`model` with its dense part replicated over the data axis by DDP, which averages gradients.

    model: a DistributedModelParallel, or a model without tables on its device.
    """
    if isinstance(model, DistributedModelParallel):
        model.init_data_parallel()
        return model
    return DistributedDataParallel(
        model,
        process_group=mesh.get_group(DATA_AXIS),
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )


def materialise(model: nn.Module, device: torch.device) -> nn.Module:
    """A model without tables, built on meta, with storage on `device`; its values are initialise_dense's."""
    return model.to_empty(device=device)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without what shards its tables and replicates its dense part."""
    return get_unwrapped_module(model)


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a parallelised model by name, without the tables."""
    return dense.dense_parameters(unwrapped(model))
