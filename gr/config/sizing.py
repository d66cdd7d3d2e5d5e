"""Sizes that follow from the data: `sizes: data` sets what a retrieval experiment leaves unset. No torch."""

from typing import Any, NamedTuple

from gr.schema import DataSchema

_EVENTS_TO_TRAIN_ON = 50_000_000  # over all epochs
_FULL_SOFTMAX = 20_000  # items up to which scoring all of them costs less than drawing negatives
SIZED = (
    "data.max_length",
    "data.lanes",
    "trainer.global_batch_size",
    "trainer.epochs",
    "trainer.log_every",
    "evaluation.every",
    "model.dim",
    "model.input_dropout",
    "model.tower.dropout",
    "model.tower.time_bias",
    "task.negatives",
)


class Size(NamedTuple):
    value: Any
    reason: str


def retrieval_sizes(schema: DataSchema) -> dict[str, Size]:
    """The value of each key of SIZED. The evidence is in docs/benchmarks."""
    mean = schema.events / schema.users
    length = min(200, max(16, 1 << (max(int(2 * mean) - 1, 1)).bit_length()))
    batch = 128 if schema.users >= 1024 else max(8, 1 << (schema.users // 8 | 1).bit_length() - 1)
    epochs = min(60, max(5, _EVENTS_TO_TRAIN_ON // max(schema.events, 1)))
    steps = -(-schema.users // batch)
    dropout = 0.2 if mean >= 50 else 0.5
    negatives = {"kind": "full"} if schema.items <= _FULL_SOFTMAX else {"kind": "per_position", "count": 256}
    dim = 64 if schema.events < 5_000_000 else 128
    return {
        "data.max_length": Size(length, f"twice the mean history of {mean:.1f} events, 16 to 200"),
        "data.lanes": Size(8 if schema.users >= 8 else 1, f"{schema.users:,} users"),
        "trainer.global_batch_size": Size(
            batch if schema.users >= 8 else 1, f"{schema.users:,} users, an eighth at most"
        ),
        "trainer.epochs": Size(epochs, f"{schema.events:,} events, 50 million to train on, 5 to 60 epochs"),
        "trainer.log_every": Size(steps, "an epoch"),
        "evaluation.every": Size(steps * max(1, epochs // 15), "15 times"),
        "model.dim": Size(dim, f"{schema.events:,} events"),
        "model.input_dropout": Size(dropout, f"{mean:.1f} events a user: .5 below 50"),
        "model.tower.dropout": Size(dropout, f"{mean:.1f} events a user: .5 below 50"),
        "model.tower.time_bias": Size(schema.timestamps, "timestamps" if schema.timestamps else "no timestamps"),
        "task.negatives": Size(negatives, f"{schema.items:,} items: full up to {_FULL_SOFTMAX:,}"),
    }
