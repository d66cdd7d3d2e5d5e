"""A lookup in sharded tables by its stages, so that ids can travel between ranks while an earlier step is computed."""

from typing import Any

import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardedModule

from gr.dist import on_stream
from gr.embeddings.local_shards import kernels_of


class PipelinedLookup:
    """The stages of torchrec's ShardedModule.forward: start, send, rows. Each does those before it that are not done.

    Every rank makes the same calls in the same order. Only rows() reads the tables: an update may come between send and
    it. On a GPU the first two run on the stream that is current at construction, that of `features`. A rank that has
    all pooled tables whole looks up at once: TorchRec's stages take a millisecond of a small step and send nothing.
    """

    def __init__(self, tables: ShardedModule, features: KeyedJaggedTensor) -> None:
        self._tables, self._features = tables, features
        self._alone = _has_whole_tables(tables)
        self._stream = torch.cuda.current_stream() if features.values().is_cuda else None
        self._context: Any = None
        self._counts: Any = None
        self._ids: Any = None

    def start(self) -> None:
        """Begins to tell the other ranks how many ids will come."""
        if self._context is None and not self._alone:
            self._context = self._tables.create_context()
            with on_stream(self._stream):
                self._counts = self._tables.input_dist(self._context, self._features)

    def send(self) -> None:
        """Waits for the counts, and lets the ids go."""
        self.start()
        if self._ids is None and not self._alone:
            with on_stream(self._stream):
                self._ids = self._counts.wait()

    def rows(self) -> Any:
        """Waits for the ids and looks them up: what the tables' forward returns, a promise of it. Once."""
        if self._alone:
            return _pooled(self._tables, self._features)
        self.send()
        with on_stream(self._stream):
            ids = self._ids.wait()
        if self._stream is not None:
            now = torch.cuda.current_stream()
            now.wait_stream(self._stream)
            ids.record_stream(now)
            self._context.record_stream(now)
        return self._tables.compute_and_output_dist(self._context, ids)


def _has_whole_tables(tables: ShardedModule) -> bool:
    """Whether this rank is alone, and its tables are pooled and not cut."""
    return (
        dist.get_world_size() == 1
        and isinstance(tables, ShardedEmbeddingBagCollection)
        and set(tables._sharding_types) == {"table_wise"}
    )


def _pooled(tables: ShardedModule, features: KeyedJaggedTensor) -> KeyedTensor:
    """The output of the kernels for their own features, side by side."""
    keys, names, dims, outputs = features.keys(), list[str](), list[int](), list[torch.Tensor]()
    for kernel in kernels_of(tables):
        own = kernel.config.feature_names()
        part = features if own == keys else features.permute([keys.index(name) for name in own])
        outputs.append(kernel.emb_module(part.values().long(), part.offsets().long()))
        names += own
        dims += kernel.config.embedding_dims()
    return KeyedTensor(names, dims, outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1))
