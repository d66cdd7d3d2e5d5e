"""The dense part of a model over ranks, applied beside the model in this order:

    activation checkpointing -> tensor parallelism -> FSDP2 of the tower and the heads -> storage -> DDP of what is left

FSDP2 is given the modules that a model names, never the model: a table's shards differ from rank to rank, and a
`fully_shard` over them ends the process. What is left (position vectors and the like) is small, and the same on every
rank.
"""

from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchrec.distributed.model_parallel import (
    DataParallelWrapper,
    DefaultDataParallelWrapper,
    DistributedModelParallel,
    get_unwrapped_module,
)
from torchrec.distributed.types import ShardingEnv

from gr.config.run import DenseConfig
from gr.errors import ConfigError
from gr.models import dense
from gr.parallel.mesh import DATA_AXIS, TENSOR_AXIS, all_ranks
from gr.parallel.tensor import split_tower


def parallelise_dense(model: nn.Module, mesh: DeviceMesh, config: DenseConfig, device: torch.device) -> nn.Module:
    """`model` with its dense part over the ranks, and with storage on `device`; gradients are averaged over ranks.

    mesh: build_mesh's for config.tensor_parallel.

    model: a DistributedModelParallel, or a model without tables; its dense part is on meta. Values are
    initialise_dense's. Raises ConfigError where `config` asks for layers of a model that names none.
    """
    inner = unwrapped(model)
    if config.activation_checkpointing == "layer":
        _compute_layers_again(inner)
    if config.tensor_parallel > 1:
        split_tower(getattr(inner, "tower", None), mesh[TENSOR_AXIS])
    if config.strategy == "fsdp":
        _shard(inner, mesh, config)
    for _, module in reversed(dense.dense_modules(inner)):
        module.to_empty(device=device, recurse=False)
    if isinstance(model, DistributedModelParallel):
        model.init_data_parallel()
        return model
    return _replicate(model)


class PlainDataParallel(DataParallelWrapper):
    """DDP over the parameters of a DistributedModelParallel that are neither the tables' nor FSDP's.

    A rank alone has none: nobody shares its gradients, and DDP's hooks cost a small step some of its time.
    """

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        if dist.get_world_size() > 1:
            DefaultDataParallelWrapper(params_to_ignore=_distributed(dmp)).wrap(dmp, env, device)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without what shards its tables and replicates its dense part."""
    return get_unwrapped_module(model)


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a parallelised model by name, without the tables."""
    return dense.dense_parameters(unwrapped(model))


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in groups that torch's fused kernels and norms take together: plain ones, and those of a mesh."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def clip_gradients(groups: Iterable[Iterable[nn.Parameter]], limit: float | None) -> torch.Tensor:
    """The norm of all gradients, over all ranks, to which they are then scaled down where it is above `limit`.

    groups: of by_mesh; torch.nn.utils.clip_grad_norm_ takes one of them. None: nothing is scaled.
    """
    groups = [list(group) for group in groups]
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norms = [_reduced(norm) if isinstance(norm, DTensor) else norm for norm in norms]
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if limit is not None:
        for group in groups:
            nn.utils.clip_grads_with_norm_(group, limit, total)
    return total


def _reduced(norm: DTensor) -> torch.Tensor:
    """The value of a norm whose parts are on the ranks, reduced along one axis of the mesh after another."""
    placements = list(norm.placements)
    for axis in range(len(placements)):
        placements[axis] = Replicate()
        norm = norm.redistribute(placements=placements)
    return norm.to_local()


def _layers(model: nn.Module) -> list[nn.Module]:
    return list(getattr(getattr(model, "tower", None), "layers", []))


def _compute_layers_again(model: nn.Module) -> None:
    """Lets the backward pass compute each layer again. No module is put around it, so parameters keep their names."""
    if not _layers(model):
        raise ConfigError(
            f"dense.activation_checkpointing=layer: {type(model).__name__} has no tower of layers; set it to none"
        )
    for layer in _layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _shard(model: nn.Module, mesh: DeviceMesh, config: DenseConfig) -> None:
    """Shards the layers of the tower one by one, then each of the model's fsdp_modules with what is left in it."""
    modules = [module for name in getattr(model, "fsdp_modules", ()) if (module := getattr(model, name)) is not None]
    modules = [module for module in modules if any(True for _ in module.parameters())]
    if not modules:
        raise ConfigError(
            f"dense.strategy=fsdp: {type(model).__name__} names no module to shard in fsdp_modules; "
            "set dense.strategy=ddp"
        )
    if config.gathered == "bf16" and not hasattr(model, "tower"):
        raise ConfigError(
            f"dense.gathered=bf16: {type(model).__name__} has no tower, which alone is gathered so; "
            "set dense.gathered=fp32"
        )
    # A root that stays gathered after an evaluation would miss what a checkpoint loads into its shards.
    shard = partial(fully_shard, reshard_after_forward=True)
    # The tower alone is computed in bf16. Its activations keep their dtype: autocast chooses that of each operator.
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = bf16 if config.gathered == "bf16" else MixedPrecisionPolicy()
    tower = getattr(model, "tower", None)
    for layer in _layers(model):
        shard(layer, mesh=mesh[DATA_AXIS], mp_policy=policy)
    for module in modules:
        if module is tower:
            shard(module, mesh=mesh[DATA_AXIS], mp_policy=policy)
        else:  # of other tokens on every rank, those of a tensor group too
            shard(module, mesh=all_ranks(mesh.device_type))


def _replicate(model: nn.Module) -> nn.Module:
    """DDP over the plain parameters of a model without tables; the model as it is where it has none, or one rank."""
    sharded = _distributed(model)
    if dist.get_world_size() == 1 or len(sharded) == sum(1 for _ in model.parameters()):
        return model
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
    return DistributedDataParallel(
        model,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )


def _distributed(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
