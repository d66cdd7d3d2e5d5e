"""Sizes that follow from the data: `sizes: data` sets what a retrieval experiment leaves unset. No torch."""

import math
from typing import Any, NamedTuple

from gr.schema import DataSchema

_EVENTS_TO_TRAIN_ON = 50_000_000  # over all epochs
_STEPS, _EPOCHS = 1280, 150  # small data trains for as many steps, in so many epochs at most, or until patience ends it
_FULL_SOFTMAX = 20_000  # items up to which scoring all of them costs less than drawing negatives
_SPARSE = 20  # events a user, below which the recipe for sparse data holds
_SHORT = 50  # events a user, below which few epochs already overfit
_SMALL = 500_000  # events in all, below which histories are learnt by heart
_TOKENS_OF_A_STEP = 2048  # of sparse data, by the mean history
SIZED = (
    "data.max_length",
    "data.event_dropout",
    "data.lanes",
    "trainer.global_batch_size",
    "trainer.epochs",
    "trainer.log_every",
    "evaluation.every",
    "evaluation.patience",
    "model.dim",
    "model.input_dropout",
    "model.tower.dropout",
    "model.tower.time_bias",
    "task.temperature",
    "task.negatives",
    "optimizer.lr",
    "embeddings.optimizer.lr",
)


class Size(NamedTuple):
    value: Any
    reason: str


def retrieval_sizes(schema: DataSchema) -> dict[str, Size]:
    """The value of each key of SIZED. The evidence is in docs/benchmarks."""
    users, events, items = schema.users, schema.events, schema.items
    mean = events / users
    sparse = mean < _SPARSE
    length = min(200, max(16, 1 << (max(int(2 * mean) - 1, 1)).bit_length()))
    batch = _batch(users, mean) if users >= 8 else 1
    steps = -(-users // batch)
    most = max(75 if sparse else 60, min(_EPOCHS, _STEPS // steps))
    epochs = min(most, max(5, _EVENTS_TO_TRAIN_ON // max(events, 1)))
    few = f"{mean:.1f} events a user, {'below' if sparse else 'not below'} {_SPARSE}"
    short = mean < _SHORT
    dropout = Size(0.5 if short else 0.2, f"{mean:.1f} events a user, {'below' if short else 'not below'} {_SHORT}")
    small = short or events < _SMALL
    by_heart = (
        f"{mean:.1f} events a user, {events:,} events, {'below' if small else 'not below'} {_SHORT} or {_SMALL:,}"
    )
    rate = Size(2e-3 if sparse else 1e-3, few)
    dim = Size(128 if sparse or events >= 5_000_000 else 64, f"{few}, {events:,} events")
    if sparse:
        negatives = Size({"kind": "in_batch"}, few)
    elif items <= _FULL_SOFTMAX:
        negatives = Size({"kind": "full"}, f"{items:,} items: full up to {_FULL_SOFTMAX:,}")
    else:
        negatives = Size({"kind": "per_position", "count": 256}, f"{items:,} items: full up to {_FULL_SOFTMAX:,}")
    return {
        "data.max_length": Size(length, f"twice the mean history of {mean:.1f} events, 16 to 200"),
        "data.event_dropout": Size(0.2 if small else 0.0, by_heart),
        "data.lanes": Size(8 if users >= 8 else 1, f"{users:,} users"),
        "trainer.global_batch_size": Size(batch, f"{users:,} users, an eighth at most; {few}"),
        "trainer.epochs": Size(epochs, f"{events:,} events, 50 million over 5 to {most} epochs of {steps:,} steps"),
        "trainer.log_every": Size(steps, "an epoch"),
        "evaluation.every": Size(steps * max(1, epochs // 15), "15 times"),
        "evaluation.patience": Size(2 if users >= 10_000 else 4, f"{users:,} users: 2 from 10,000 on"),
        "model.dim": dim,
        "model.input_dropout": dropout,
        "model.tower.dropout": dropout,
        "model.tower.time_bias": Size(schema.timestamps, "timestamps" if schema.timestamps else "no timestamps"),
        "task.temperature": Size(0.1 if small else 0.05, by_heart),
        "task.negatives": negatives,
        "optimizer.lr": rate,
        "embeddings.optimizer.lr": rate,
    }


def _batch(users: int, mean: float) -> int:
    """Users a step: with few events each, the power of two nearest to 2,048 tokens; else 128; an eighth at most."""
    wanted = 1 << round(math.log2(_TOKENS_OF_A_STEP / mean)) if mean < _SPARSE else 128
    return min(wanted, 1 << (users // 8).bit_length() - 1) if users < 8 * wanted else wanted
