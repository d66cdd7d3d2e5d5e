"""fbgemm-gpu-cpu 1.8.0: the dense kernel ignores PoolingMode.NONE on CPU.

It returns pooled rows where one row per id is asked for, so an EmbeddingCollection with the dense kernel or with
data-parallel sharding gets a wrong shape or corrupts the heap. The repair looks the rows up with F.embedding.
"""

from collections.abc import Iterator
from functools import wraps
from itertools import groupby

import torch
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import DenseTableBatchedEmbeddingBagsCodegen
from torch import Tensor

_original_forward = DenseTableBatchedEmbeddingBagsCodegen.forward


def dense_sequence_lookup_is_broken() -> bool:
    """True when the installed class, as it stands now, pools a sequence lookup on CPU."""
    tables = DenseTableBatchedEmbeddingBagsCodegen([(3, 4)], pooling_mode=PoolingMode.NONE, use_cpu=True)
    # 2 bags that hold 3 ids: pooled output has 2 rows, a sequence lookup has 3.
    rows = tables(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3]))
    return rows.shape[0] != 3


def repair_dense_sequence_lookup() -> None:
    DenseTableBatchedEmbeddingBagsCodegen.forward = _sequence_lookup


@wraps(_original_forward)
def _sequence_lookup(
    self,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None = None,
    feature_requires_grad: Tensor | None = None,
    batch_size_per_feature_per_rank: list[list[int]] | None = None,
) -> Tensor:
    if not (self.use_cpu and self.pooling_mode == PoolingMode.NONE):
        return _original_forward(
            self, indices, offsets, per_sample_weights, feature_requires_grad, batch_size_per_feature_per_rank
        )
    if batch_size_per_feature_per_rank is not None:
        raise ValueError("batch_size_per_feature_per_rank: variable batch sizes have no CPU sequence lookup here")
    rows = [
        F.embedding(indices[first:last].long(), weights) for first, last, weights in _lookups_by_table(self, offsets)
    ]
    out = torch.cat(rows)
    return out.float() if self.output_dtype == SparseType.FP32.as_int() else out


def _lookups_by_table(self, offsets: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first id, last id, weights) of each run of features that share a table: one gradient a table, not a feature."""
    starts = self.weights_offsets.tolist()
    batch_size = (offsets.numel() - 1) // len(starts)
    shape_at = dict(zip(self.weights_physical_offsets[:-1], self.embedding_specs, strict=True))
    feature = 0
    for start, same_table in groupby(starts):
        first, feature = feature, feature + len(list(same_table))
        rows, dim = shape_at[start]
        weights = self.weights[start : start + rows * dim].view(rows, dim)
        yield int(offsets[first * batch_size]), int(offsets[feature * batch_size]), weights
