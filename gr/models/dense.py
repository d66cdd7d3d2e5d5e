"""The dense part of a single-device model: its modules and parameters without the tables, and its initial values."""

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.types import ShardedModule

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
    """Initial dense values from `seed` alone: sharding has used each rank's generator to a different extent.

    Every module's reset_parameters is called, children first: a layer has the last word on the linear maps in it.
    Raises TrainingError for a parameter or buffer that none of them fills: what `__init__` gave it was lost when the
    model, built on meta, got its storage.
    """
    modules = dense_modules(model)
    with torch.no_grad():
        for _, module in modules:
            for _, tensor in _own_tensors(module):
                tensor.fill_(_mark(tensor))
    torch.manual_seed(seed)
    for _, module in reversed(modules):
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    for path, module in modules:
        for name, tensor in _own_tensors(module):
            if tensor.numel() and bool(_is_mark(tensor).any()):
                place = f"{path + '.' if path else ''}{name} of {type(module).__qualname__}"
                raise TrainingError(
                    f"nothing fills {place}: models are built on meta, where values given in __init__ are lost; "
                    "fill it in the class's reset_parameters"
                )


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _mark(tensor: Tensor) -> float | int | bool:
    """A value that no initialisation leaves: NaN, the least integer; of booleans there is none."""
    if tensor.is_floating_point() or tensor.is_complex():
        return float("nan")
    return False if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min


def _is_mark(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return torch.zeros_like(tensor)
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.isnan()
    return tensor == _mark(tensor)
