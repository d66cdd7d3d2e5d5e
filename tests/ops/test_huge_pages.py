"""Huge pages under a tensor: what is marked, and what becomes of its values."""

import re
from pathlib import Path

import torch

from gr.ops.huge_pages import PAGE_BYTES, take_huge_pages


def flags_at(address: int) -> str:
    """VmFlags of the mapping that has an address, from /proc/self/smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line
    raise AssertionError(f"no mapping has {address:#x}")


def test_whole_pages_are_given_back_and_marked() -> None:
    table = torch.ones(4 * PAGE_BYTES // 4)
    take_huge_pages(table)
    assert " hg" in flags_at(table.data_ptr() + table.nbytes // 2)
    # A page may begin and end within it, so at least two of four lie in it whole.
    assert 2 * PAGE_BYTES // 4 <= int((table == 0).sum()) <= 4 * PAGE_BYTES // 4
    assert (table.fill_(2.0) == 2).all()


def test_zeros_stay_zeros_and_the_neighbours_as_they_are() -> None:
    whole = torch.full((6 * PAGE_BYTES // 4,), 3.0)
    inner = whole[PAGE_BYTES // 8 : -PAGE_BYTES // 8].zero_()
    take_huge_pages(inner)
    assert not inner.any() and (whole[: PAGE_BYTES // 8] == 3).all() and (whole[-PAGE_BYTES // 8 :] == 3).all()


def test_a_small_one_is_left_alone() -> None:
    small = torch.ones(1000)
    take_huge_pages(small)
    take_huge_pages(torch.zeros(0, 8))
    assert (small == 1).all()
