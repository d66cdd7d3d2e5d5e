"""A lookup in sharded tables by its stages, so that ids can travel between ranks while an earlier step is computed."""

from typing import Any

import torch
from torchrec import KeyedJaggedTensor
from torchrec.distributed.types import ShardedModule

from gr.dist import on_stream


class PipelinedLookup:
    """The stages of torchrec's ShardedModule.forward: start, send, rows. Each does those before it that are not done.

    Every rank makes the same calls in the same order. Only rows() reads the tables: an update may come between send and
    it. On a GPU the first two run on the stream that is current at construction, that of `features`.
    """

    def __init__(self, tables: ShardedModule, features: KeyedJaggedTensor) -> None:
        self._tables, self._features = tables, features
        self._stream = torch.cuda.current_stream() if features.values().is_cuda else None
        self._context: Any = None
        self._counts: Any = None
        self._ids: Any = None

    def start(self) -> None:
        """Begins to tell the other ranks how many ids will come."""
        if self._context is None:
            self._context = self._tables.create_context()
            with on_stream(self._stream):
                self._counts = self._tables.input_dist(self._context, self._features)

    def send(self) -> None:
        """Waits for the counts, and lets the ids go."""
        self.start()
        if self._ids is None:
            with on_stream(self._stream):
                self._ids = self._counts.wait()

    def rows(self) -> Any:
        """Waits for the ids and looks them up: what the tables' forward returns, a promise of it. Once."""
        self.send()
        with on_stream(self._stream):
            ids = self._ids.wait()
        if self._stream is not None:
            now = torch.cuda.current_stream()
            now.wait_stream(self._stream)
            ids.record_stream(now)
            self._context.record_stream(now)
        return self._tables.compute_and_output_dist(self._context, ids)
