"""Tables of a card in tests: functions of a module, since they are called in the card's process."""

import os

import torch
from torch import Tensor

from gr.serving.tables.packed import PackedTables

ROWS = 50


def weight(name: str, width: int) -> Tensor:
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(len(name) * 1000 + ord(name[-1])))


def open_tables(widths: dict[str, int]) -> PackedTables:
    """Rows of 8 bits, summed."""
    weights = {name: weight(name, width) for name, width in widths.items()}
    return PackedTables(weights, dict.fromkeys(widths, "int8"), {name: [name] for name in widths}, pooled=True)


def fail() -> PackedTables:
    raise OSError("no such file")


def end() -> PackedTables:
    os._exit(3)
