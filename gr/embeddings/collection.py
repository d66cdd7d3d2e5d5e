"""The EmbeddingCollection of a sequence model, on meta, and the one lookup a step makes in it."""

import torch
from torch import Tensor
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType

from gr.batch import ITEM_FEATURE
from gr.config.tree import EmbeddingsConfig

CANDIDATE_FEATURE = "candidate_id"
# fbgemm asserts that a row is a multiple of 4 elements wide.
ROW_MULTIPLE = 4


def stored_dim(dim: int) -> int:
    """Columns a table of width `dim` takes: the columns past `dim` are zero and stay zero."""
    return -(-dim // ROW_MULTIPLE) * ROW_MULTIPLE


def build_collection(rows: int, dim: int, config: EmbeddingsConfig) -> EmbeddingCollection:
    """The item table, without storage: rows x stored_dim(dim), read by the history and by the candidates."""
    table = EmbeddingConfig(
        name=ITEM_FEATURE,
        num_embeddings=rows,
        embedding_dim=stored_dim(dim),
        feature_names=[ITEM_FEATURE, CANDIDATE_FEATURE],
        data_type=DataType.FP16 if config.dtype == "fp16" else DataType.FP32,
    )
    return EmbeddingCollection([table], device=torch.device("meta"))


def lookup(
    collection: torch.nn.Module, history: KeyedJaggedTensor, candidates_K: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Vectors of the history's tokens and of the candidates, in one pass over the (sharded) table.

    Returns float [T, dim] and float [K, dim]. One KJT carries both, so that there is one all-to-all a step; the
    candidates belong to no example and are filed under the first.
    """
    lengths = history.lengths()
    filed = torch.zeros_like(lengths)
    filed[0] = candidates_K.numel()
    both = KeyedJaggedTensor(
        keys=[ITEM_FEATURE, CANDIDATE_FEATURE],
        values=torch.cat([history.values(), candidates_K]),
        lengths=torch.cat([lengths, filed]),
    )
    rows = collection(both)
    return rows[ITEM_FEATURE].values()[:, :dim], rows[CANDIDATE_FEATURE].values()[:, :dim]
