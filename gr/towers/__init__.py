"""Dense towers: JaggedSequence in, JaggedSequence of the same shape out. One protocol for all of them."""

from typing import Protocol

from torch import nn

from gr.config.stu import STUConfig
from gr.config.tree import HSTUConfig, SASRecConfig
from gr.sequence import JaggedSequence
from gr.towers.hstu import HSTU
from gr.towers.sasrec import SASRec
from gr.towers.stu import STU


class Tower(Protocol):
    """values_TD -> values_TD. A token's output depends on the tokens before it and on itself, never on later ones.

    Where a sequence has candidates or a contextual prefix, STU says what sees what; the others refuse it.
    """

    def __call__(self, sequence: JaggedSequence) -> JaggedSequence: ...


class TowerChoice(Protocol):
    """The part of a model's configuration that chooses its tower."""

    @property
    def dim(self) -> int: ...

    @property
    def tower(self) -> HSTUConfig | SASRecConfig | STUConfig: ...


def build_tower(config: TowerChoice, max_length: int) -> nn.Module:
    """The tower that `config.tower.kind` names, on the default device, for sequences of at most max_length tokens."""
    match config.tower:
        case HSTUConfig() as tower:
            return HSTU(tower, dim=config.dim, max_length=max_length)
        case SASRecConfig() as tower:
            return SASRec(tower, dim=config.dim, max_length=max_length)
        case STUConfig() as tower:
            return STU(tower, dim=config.dim, max_length=max_length)


__all__ = ["Tower", "build_tower"]
