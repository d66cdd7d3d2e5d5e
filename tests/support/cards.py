"""Tables of a card in tests: functions of a module, since they are called in the card's process."""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 50


def weight(name: str, width: int) -> Tensor:
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(len(name) * 1000 + ord(name[-1])))


class Tables:
    """Sums of rows in fp32, with the call of PackedTables."""

    def __init__(self, widths: dict[str, int]) -> None:
        self.weights = [weight(name, width) for name, width in widths.items()]

    def __call__(self, ids: Tensor, offsets: Tensor) -> Tensor:
        B = (len(offsets) - 1) // len(self.weights)
        bounds = [offsets[place * B : (place + 1) * B + 1] for place in range(len(self.weights))]
        return torch.cat(
            [
                F.embedding_bag(ids[own[0] : own[-1]], table, own[:-1] - own[0], mode="sum")
                for own, table in zip(bounds, self.weights, strict=True)
            ],
            dim=1,
        )


def open_tables(widths: dict[str, int]) -> Tables:
    return Tables(widths)


def fail() -> Tables:
    raise OSError("no such file")
