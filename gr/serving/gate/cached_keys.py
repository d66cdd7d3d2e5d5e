"""A ranking model that sees keys and values as a cache keeps them, for the gate. T tokens, G heads, widths Q and V."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gr.errors import ServingError
from gr.models.sequence_ranking import SequenceRanker
from gr.serving.passes.cached_rows import stored, widened


@contextmanager
def rounded_keys(model: SequenceRanker, dtype: torch.dtype) -> Iterator[None]:
    """All keys and values of the model's tower as a cache of `dtype` gives them back, while it is open.

    Those of candidates are rounded too, which a package keeps as they are, so a package is at least as close to the
    model. Raises ServingError for a tower whose layers do not say what their keys are.
    """

    def rounded(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """values: of a layer; the last two are keys [T, G, Q] and values [T, G, V]."""
        *others, k_TGQ, v_TGV = values
        k, v = widened(stored(k_TGQ, v_TGV, dtype)).split([k_TGQ.shape[-1], v_TGV.shape[-1]], dim=-1)
        return *others, k.to(k_TGQ.dtype), v.to(v_TGV.dtype)

    def patch(source: Any, name: str) -> None:
        own: Callable[..., tuple[Tensor, ...]] = getattr(source, name)
        setattr(source, name, lambda *inputs: rounded(own(*inputs)))

    layers = model.tower.layers
    assert isinstance(layers, nn.ModuleList), "a tower is a stack of layers"
    sources = [_source(layer) for layer in layers]
    for source, name in sources:
        patch(source, name)
    try:
        yield
    finally:
        for source, name in sources:
            delattr(source, name)


def _source(layer: nn.Module) -> tuple[nn.Module, str]:
    """The module of a layer, and its method, whose results end with the keys and values."""
    for source in layer.modules():
        for name in ("project", "turned", "keys"):
            if hasattr(type(source), name):
                return source, name
    raise ServingError(f"{type(layer).__name__} has no method that gives its keys, so cache is fp32: leave it unset")
