"""TorchRec's index dedup of sequence tables on CPU: fbgemm has its kernel for CUDA alone.

With it a rank asks for a row once a step, however many of its tokens, candidates and negatives read the row: an id goes
to the rank that has it once, a vector comes back once, and one gradient returns, the sum of all uses.

T ids, U of them distinct, F features of B bags each.
"""

from itertools import pairwise

import torch
from torch import Tensor

from gr.ops.id_table import count_ids

_OPERATOR = "fbgemm::jagged_unique_indices"
_library = torch.library.Library("fbgemm", "IMPL")


def unique_indices(
    table_starts: Tensor, feature_starts: Tensor, offsets: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The distinct ids of each table: (lengths [F B], offsets [F B + 1], ids [U], the place of each id among them [T]).

    table_starts: [F + 1], rows of the tables before, which tell ids of several tables apart in fbgemm's one sort.
    feature_starts: [F + 1], features of a table lie between two that differ. offsets: [F B + 1], of the bags in
    `indices` [T]. All int64. The ids of a table are dealt to the bags of its features evenly, which says nothing:
    bags of sequences are read through the places.
    """
    lengths = torch.zeros(len(offsets) - 1, dtype=torch.int64)
    batch_size = len(lengths) // (len(table_starts) - 1)
    distinct, places, count = [], [], 0
    for first, last in pairwise(feature_starts.tolist()):
        if first < last:
            bags = lengths[first * batch_size : last * batch_size]
            ids_U, _, place_T = count_ids(indices[offsets[first * batch_size] : offsets[last * batch_size]])
            bags.fill_(len(ids_U) // len(bags))[: len(ids_U) % len(bags)] += 1
            distinct.append(ids_U)
            places.append(place_T + count)
            count += len(ids_U)
    ends = torch.zeros_like(offsets)
    torch.cumsum(lengths, 0, out=ends[1:])
    return lengths, ends, torch.cat(distinct), torch.cat(places)


def have_index_dedup_on_cpu() -> None:
    """Gives torch the kernel, once a process, unless fbgemm comes with one."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, "CPU"):
        _library.impl("jagged_unique_indices", unique_indices, "CPU")
