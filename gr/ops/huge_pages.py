"""Huge pages for tables in host memory: rows that lie apart are then found without a walk through page tables.

A step reads and writes some thousand rows anywhere in a table. With pages of 4 kB each of them misses the TLB once a
table is larger than a few MB, which makes a step at 10 million rows dearer than one at 10,000.
"""

import ctypes

from torch import Tensor

PAGE_BYTES = 1 << 21
_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14  # constants of madvise(2)


def take_huge_pages(tensor: Tensor) -> None:
    """Gives the pages of a tensor on CPU back, and asks for huge ones when it is next written to.

    tensor: new, its values zeros or of no use: they are zeros afterwards wherever pages were given back. The huge pages
    are advice: a kernel that has none, or no room for them, takes small ones, and only the speed of a step tells.
    """
    first = -(-tensor.data_ptr() // PAGE_BYTES) * PAGE_BYTES
    count = (tensor.data_ptr() + tensor.nbytes - first) // PAGE_BYTES
    libc = ctypes.CDLL(None)
    if count <= 0 or tensor.device.type != "cpu" or not hasattr(libc, "madvise"):
        return
    for advice in (_MADV_DONTNEED, _MADV_HUGEPAGE):
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(count * PAGE_BYTES), advice)
