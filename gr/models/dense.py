"""The dense part of a single-device model: its modules and parameters without the tables, and its initial values."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.types import ShardedModule

from gr.embeddings.init import key_of, normal, open_unit
from gr.errors import TrainingError

TABLES = (ShardedModule, EmbeddingCollection, EmbeddingBagCollection)


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name, without the tables."""
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in dense_modules(model)
        for name, parameter in module.named_parameters(recurse=False)
    }


def dense_modules(model: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """Every module with its path, parents first, without the tables."""
    modules = [(path, model)]
    for name, child in model.named_children():
        if not isinstance(child, TABLES):
            modules += dense_modules(child, f"{path}.{name}" if path else name)
    return modules


def initialise_dense(model: nn.Module, seed: int) -> None:
    """Initial dense values as a function of (seed, parameter's name, index), so that no way of sharding changes them.

    Of a sharded parameter (a DTensor) each rank fills its own part. Every module's reset_parameters is called, children
    first: a layer has the last word on the linear maps in it. The normal and uniform values that it asks for come from
    counters, not from a generator (_CountedDraws).
    Raises TrainingError for a parameter or buffer that none of them fills: what `__init__` gave it was lost when the
    model, built on meta, got its storage; and for other random values than torch.nn.init's of a parameter.
    """
    modules = dense_modules(model)
    with torch.no_grad():
        for _, module in modules:
            for _, tensor in _own_tensors(module):
                local_part(tensor).fill_(_mark(tensor))
    names = {f"{path}.{name}": tensor for path, module in modules for name, tensor in _own_tensors(module)}
    with _CountedDraws(names, seed):
        for _, module in reversed(modules):
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    for path, module in modules:
        for name, tensor in _own_tensors(module):
            if bool(_is_mark(local_part(tensor)).any()):
                place = f"{path + '.' if path else ''}{name} of {type(module).__qualname__}"
                raise TrainingError(
                    f"nothing fills {place}: models are built on meta, where values given in __init__ are lost; "
                    "fill it in the class's reset_parameters"
                )


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: of a DTensor its shard, else all of it."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


class _CountedDraws(TorchDispatchMode):
    """Makes normal_ and uniform_ on known tensors functions of (seed, name, number of the draw, index in the tensor).

    A draw on a view of a tensor has the indices of the view's elements, so it does not matter how it is cut. Of a
    sharded tensor only the whole can be drawn.
    """

    def __init__(self, tensors: Mapping[str, Tensor], seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._tensors = {
            local_part(tensor).untyped_storage().data_ptr(): (name, tensor)
            for name, tensor in tensors.items()
            if local_part(tensor).numel()
        }
        self._draws: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        drawn = args[0] if args and isinstance(args[0], Tensor) else None
        target = None if drawn is None else local_part(drawn)
        name, whole = self._tensors.get(-1 if target is None else target.untyped_storage().data_ptr(), ("", None))
        draw = _DRAWS.get(func)
        if draw is not None and target is not None and not target.numel():
            return drawn
        is_part = isinstance(whole, DTensor) and target is not None and target.shape != local_part(whole).shape
        if draw is None or target is None or whole is None or is_part:
            raise TrainingError(
                f"reset_parameters draws random values by {func}: only what normal_ and uniform_ write into "
                "a parameter (torch.nn.init.normal_, uniform_, xavier_*, kaiming_*; not trunc_normal_, orthogonal_) is "
                "the same however the model is sharded; under dense.strategy=fsdp, into all of it at once"
            )
        key = key_of(self._seed, f"{name}/{self._draws[name]}")
        self._draws[name] += 1
        if isinstance(whole, DTensor):
            counters = _shard_counters(whole)
        else:
            offset = target.storage_offset() - whole.storage_offset()
            counters = torch.arange(whole.numel(), device=target.device)
            counters = counters.as_strided(target.shape, target.stride(), offset)
        target.copy_(draw(counters, key, *args[1:]))
        return drawn


def _shard_counters(whole: DTensor) -> Tensor:
    """The index in the whole tensor of each element of this rank's shard, which is a box in it."""
    sizes, offsets = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
    counters = torch.zeros((), dtype=torch.int64, device=whole.device)
    for size, offset, length in zip(sizes, offsets, whole.shape, strict=True):
        counters = counters[..., None] * length + (torch.arange(size, device=whole.device) + offset)
    return counters


def _uniform_between(counters: Tensor, key: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * open_unit(counters, key)


def _normal_of(counters: Tensor, key: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return mean + std * normal(counters, key)


_DRAWS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.uniform_.default: _uniform_between,
    torch.ops.aten.normal_.default: _normal_of,
}


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _mark(tensor: Tensor) -> float | int | bool:
    """A value that no initialisation leaves: NaN, the least integer, the largest unsigned one; no boolean."""
    if tensor.is_floating_point() or tensor.is_complex():
        return float("nan")
    if tensor.dtype == torch.bool:
        return False
    limits = torch.iinfo(tensor.dtype)
    return limits.min or limits.max


def _is_mark(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return torch.zeros_like(tensor)
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.isnan()
    return tensor == _mark(tensor)
