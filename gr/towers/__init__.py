"""Dense towers: JaggedSequence in, JaggedSequence of the same shape out. One protocol for all of them."""

from typing import Protocol

from torch import nn

from gr.config.towers import TOWERS, TowerConfig
from gr.sequence import JaggedSequence


class Tower(Protocol):
    """values_TD -> values_TD. A token's output depends on the tokens before it and on itself, never on later ones.

    Where a sequence has candidates or a contextual prefix, STU says what sees what; the others refuse it. Models are
    built on meta, so what `__init__` puts into a parameter or buffer is lost: `reset_parameters` of the module that
    owns it fills it, and what nothing fills is an error when a run is built.
    """

    def __call__(self, sequence: JaggedSequence) -> JaggedSequence: ...


def build_tower(config: TowerConfig, *, dim: int, max_length: int) -> nn.Module:
    """The tower that `config` configures, on the default device. dim: D. max_length: tokens of the longest sequence."""
    return TOWERS.target(config)(config, dim=dim, max_length=max_length)


__all__ = ["Tower", "build_tower"]
