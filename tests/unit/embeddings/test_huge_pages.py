"""Huge pages under a tensor: values stay, and Linux has marked what lies under it."""

import re
from pathlib import Path

import pytest
import torch

from gr.embeddings.huge_pages import PAGE_BYTES, advise_huge_pages


def flags_at(address: int) -> str:
    """VmFlags of the mapping that has an address, from /proc/self/smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line
    raise AssertionError(f"no mapping has {address:#x}")


@pytest.mark.parametrize("touched", [True, False])
def test_a_table_is_marked_and_keeps_its_values(touched: bool) -> None:
    table = torch.arange(4 * PAGE_BYTES // 4, dtype=torch.float32) if touched else torch.zeros(4 * PAGE_BYTES // 4)
    before = table.clone()
    advise_huge_pages(table)
    assert torch.equal(table, before)
    assert " hg" in flags_at(table.data_ptr() + table.nbytes // 2)


def test_a_small_one_is_left_alone() -> None:
    advise_huge_pages(torch.zeros(1000))
    advise_huge_pages(torch.zeros(0, 8))
