"""Weights of facebookresearch/dlrm to gr's DLRM and back, bit for bit.

The published code flattens the lower triangle of the dot products (i > j, row by row), gr the upper one (i < j), as
torchrec does. The same product stands in another column, so that the first matrix of the top MLP changes its columns.
Tables are matched by position: emb_l.k is the k-th table of the model.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gr.config.dlrm import CatInteraction, DotInteraction
from gr.errors import CheckpointError
from gr.models.dlrm import DLRM

# gr's MLPs number their layers as the published nn.Sequential does, ReLU included.
MLP_NAMES = {"bottom.": "bot_l.", "top.": "top_l."}
AFTER_INTERACTION = "top.0.weight"
NAMES_SHOWN = 5


def from_facebook(state: Mapping[str, Tensor], model: DLRM) -> dict[str, Tensor]:
    """The "state_dict" of a published checkpoint as `model.load_state_dict` takes it; all but one tensor is shared.

    model: may be on meta, only names and shapes are read. Raises CheckpointError where names or shapes differ.
    """
    names = _names(model)
    shapes = {theirs: model.get_parameter(ours).shape for ours, theirs in names.items()}
    _check(state, shapes, "facebookresearch/dlrm weights")
    converted = {ours: state[theirs] for ours, theirs in names.items()}
    columns = _published_columns(model).to(converted[AFTER_INTERACTION].device)
    converted[AFTER_INTERACTION] = converted[AFTER_INTERACTION].index_select(1, columns)
    return converted


def to_facebook(state: Mapping[str, Tensor], model: DLRM) -> dict[str, Tensor]:
    """The inverse of from_facebook. state: whole tensors by the names of `model.state_dict()`."""
    names = _names(model)
    _check(state, {ours: model.get_parameter(ours).shape for ours in names}, "DLRM weights")
    converted = {theirs: state[ours] for ours, theirs in names.items()}
    columns = _published_columns(model).argsort().to(state[AFTER_INTERACTION].device)
    converted[names[AFTER_INTERACTION]] = state[AFTER_INTERACTION].index_select(1, columns)
    return converted


def _names(model: DLRM) -> dict[str, str]:
    """gr's name of every parameter -> the published one. Raises CheckpointError where none was published."""
    interaction = model.config.interaction
    if not isinstance(interaction, DotInteraction | CatInteraction):
        raise CheckpointError(f"facebookresearch/dlrm has no interaction '{interaction.kind}', only dot and cat")
    if model.bottom is None:
        raise CheckpointError("facebookresearch/dlrm has no models without dense features")
    if model.config.row_weights:
        raise CheckpointError("facebookresearch/dlrm keeps weights of rows as they are, gr less one: not the same bits")
    if len(model.columns) < len(model.features):
        raise CheckpointError("facebookresearch/dlrm has a table for each feature, and here features share one")
    names = {f"tables.embedding_bags.{name}.weight": f"emb_l.{k}.weight" for k, name in enumerate(model.features)}
    for ours, theirs in MLP_NAMES.items():
        for name, _ in model.get_submodule(ours.rstrip(".")).named_parameters():
            names[ours + name] = theirs + name
    return names


def _published_columns(model: DLRM) -> Tensor:
    """int64 [width]: for each column that enters gr's top MLP, the column of the published code with the same value."""
    width, dim = model.interaction.width, model.config.dim
    interaction = model.config.interaction
    if not isinstance(interaction, DotInteraction):
        return torch.arange(width)
    T, diagonal = len(model.features) + 1, 0 if interaction.self_interaction else 1
    low, high = torch.triu_indices(T, T, diagonal)
    # Row `high` of the lower triangle comes after its rows 0 .. high-1, which have 1, 2, ... or 0, 1, ... elements.
    row_start = high * (high + 1 - 2 * diagonal) // 2
    return torch.cat([torch.arange(dim), dim + row_start + low])


def _check(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], what: str) -> None:
    if faults := list(_faults(state, shapes)):
        more = f" and {len(faults) - NAMES_SHOWN} more" if len(faults) > NAMES_SHOWN else ""
        raise CheckpointError(f"{what} do not fit the model: {'; '.join(faults[:NAMES_SHOWN])}{more}")


def _faults(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Iterator[str]:
    for name, shape in shapes.items():
        if name not in state:
            yield f"{name} is missing"
        elif state[name].shape != shape:
            yield f"{name} has shape {list(state[name].shape)}, expected {list(shape)}"
    for name in state:
        if name not in shapes:
            yield f"{name} is unknown"
