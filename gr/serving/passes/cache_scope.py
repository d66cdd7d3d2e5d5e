"""Whether keys and values of a ranking model may be kept from one request of a user to the next.

Within a request they always may: all candidates see the same history. Across requests they may where an event that is
added changes nothing that was computed for those before it, to the last bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gr.config.ranking import RankingConfig
from gr.config.towers import HSTUConfig, LlamaConfig, SASRecConfig, STUConfig, TowerConfig


@dataclass(frozen=True)
class Scope:
    """reason: what makes it so, in the words of the configuration."""

    lifetime: Literal["request", "user"]
    reason: str


def cache_scope(config: RankingConfig) -> Scope:
    """The longest lifetime of cached keys and values at which predictions stay those of a full pass."""
    reasons = [*_input_changes(config), *_tower_changes(config.model.tower)]
    if reasons:
        return Scope("request", "; ".join(reasons))
    return Scope("user", "a later event changes no token before it")


def _input_changes(config: RankingConfig) -> Iterator[str]:
    if config.task.supervision == "candidates" and config.model.place == "request":
        yield (
            "model.place=request: positions and ages of all events are counted from the request, and context sees the "
            "whole history"
        )


def _tower_changes(tower: TowerConfig) -> Iterator[str]:
    match tower:
        case STUConfig():
            if tower.min_full_attn_seq_len:
                yield (
                    f"model.tower.min_full_attn_seq_len={tower.min_full_attn_seq_len}: what an event sees depends on "
                    "how many come after it"
                )
        case HSTUConfig():
            if tower.attention == "softmax":
                yield "model.tower.attention=softmax: its sums change in their last bits with the length"
            if tower.time_bias:
                yield "model.tower.time_bias: the newest event is biased by the time of the next one"
            if tower.divisor == "actual_len":
                yield "model.tower.divisor=actual_len: all sums are divided by the length"
        case SASRecConfig() | LlamaConfig():
            yield f"model.tower.kind={tower.kind}: the sums of softmax change in their last bits with the length"
        case _:
            yield f"model.tower.kind={tower.kind}: is not known to leave earlier events as they were"
