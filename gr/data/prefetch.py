"""Work ahead of its use: row groups decoded by a pool of threads, batches collated in one more thread."""

from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


class RowGroupCache(Generic[T]):
    """Decoded row groups by least recent use; a group that is requested twice is decoded once.

    capacity: groups that stay besides those that callers hold. Used by one thread at a time.
    """

    def __init__(self, read: Callable[[int], T], *, threads: int, capacity: int) -> None:
        self._read, self._capacity = read, capacity
        self._groups: OrderedDict[int, Future[T]] = OrderedDict()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gr-read")

    def request(self, group_B: np.ndarray) -> "tuple[list[Future[T]], np.ndarray]":
        """The distinct row groups of a batch, and the index among them of each example; -1 (no row) stays -1."""
        distinct, index_B = np.unique(group_B, return_inverse=True)
        groups = []
        for group in distinct[distinct >= 0].tolist():
            if group not in self._groups:
                self._groups[group] = self._pool.submit(self._read, group)
            self._groups.move_to_end(group)
            groups.append(self._groups[group])
            while len(self._groups) > self._capacity:
                self._groups.popitem(last=False)
        return groups, index_B - (len(groups) < len(distinct))  # -1 comes first

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Ahead(Generic[T]):
    """Iterator of a generator's items, which are made in a thread of its own, `capacity` of them ahead.

    What the generator raises, StopIteration at its end, is raised again at every later next().
    """

    def __init__(self, items: Generator[T, None, None], capacity: int) -> None:
        self._items = items
        self._error: BaseException | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="gr-collate")
        self._futures = deque(self._pool.submit(next, items) for _ in range(capacity))

    def __next__(self) -> T:
        if self._error is None:
            self._error = self._futures[0].exception()
        if self._error is not None:
            self.close()
            raise self._error
        self._futures.append(self._pool.submit(next, self._items))
        return self._futures.popleft().result()

    def close(self) -> None:
        """Stops the thread and ends the generator; next() then raises StopIteration. Safe to call twice."""
        self._error = self._error or StopIteration()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._items.close()
