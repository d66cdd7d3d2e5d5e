"""The dense layers of a model, and their products in bfloat16: autocast, layer by layer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from gr.config.export import Kind

# Of a layer, or of its attention: it is called as a whole, or for its keys and values.
_METHODS = ("forward", "project", "keys")


def dense_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model's dense part that have matrices, by name, in the order of the computation."""
    parts = ((name, getattr(model, name)) for name in getattr(model, "fsdp_modules", ()))
    return dict(layer for name, part in parts if part is not None for layer in _layers(name, part))


def _layers(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    stack = getattr(module, "layers", None)
    if isinstance(module, nn.Sequential):
        stack = module
    elif stack is not None:
        name = f"{name}.layers"
    if stack is None:
        if any(parameter.dim() > 1 for parameter in module.parameters()):
            yield name, module
        return
    for place, layer in stack.named_children():
        yield from _layers(f"{name}.{place}", layer)


def layer_bytes(layer: nn.Module, kind: Kind) -> int:
    """Bytes of a layer's parameters where its products are of this type."""
    matrix = 2 if kind == "bf16" else 4
    return sum(parameter.numel() * (matrix if parameter.dim() > 1 else 4) for parameter in layer.parameters())


@contextmanager
def in_bf16(layers: Iterable[nn.Module]) -> Iterator[None]:
    """The layers with products in bfloat16 while it is open: their weights and inputs are rounded, and sums are not."""
    own = [module for layer in layers for module in layer.modules()]
    kinds = [type(module) for module in own]
    try:
        for module, kind in zip(own, kinds, strict=True):
            module.__class__ = _kind_in_bf16(kind)
        yield
    finally:
        for module, kind in zip(own, kinds, strict=True):
            module.__class__ = kind


def put_in_bf16(layer: nn.Module) -> None:
    """The layer with products in bfloat16 from now on, to the bits of in_bf16, and its matrices stored so."""
    for module in layer.modules():
        module.__class__ = _kind_in_bf16(type(module))
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16()


def _kind_in_bf16(kind: type[nn.Module]) -> type[nn.Module]:
    """The kind of a module, with autocast around each of its methods. A class: copies of a module keep it."""
    methods = {name: _autocast(getattr(kind, name)) for name in _METHODS if hasattr(kind, name)}
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})


def _autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def products_in_bf16(module: nn.Module, *inputs: Any) -> Any:
        inputs = tuple(_in_float32(each) if callable(each) else each for each in inputs)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = method(module, *inputs)
        return outputs.float() if isinstance(outputs, Tensor) else tuple(each.float() for each in outputs)

    return products_in_bf16


def _in_float32(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The attention of a layer, which is no product with a matrix of its own."""

    def attention(*inputs: Tensor, **named: Tensor | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return attend(*inputs, **named)

    return attention
