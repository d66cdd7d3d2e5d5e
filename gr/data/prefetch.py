"""Reading ahead: row groups decoded by a pool of threads, batches collated by one more into a bounded queue."""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


class RowGroupCache(Generic[T]):
    """Decoded row groups by least recent use; a group that is asked for twice is decoded once.

    capacity: groups kept besides those that callers hold. Used by one thread at a time.
    """

    def __init__(self, read: Callable[[int], T], *, threads: int, capacity: int) -> None:
        self._read, self._capacity = read, capacity
        self._groups: OrderedDict[int, Future[T]] = OrderedDict()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gr-read")

    def request(self, group: int) -> "Future[T]":
        """The row group, being decoded or decoded."""
        if group not in self._groups:
            self._groups[group] = self._pool.submit(self._read, group)
        self._groups.move_to_end(group)
        while len(self._groups) > self._capacity:
            self._groups.popitem(last=False)
        return self._groups[group]

    def request_all(self, group_B: np.ndarray) -> "tuple[list[Future[T]], np.ndarray]":
        """The distinct row groups of a batch, and the index among them of each example; -1 (no row) stays -1."""
        used, index_B = np.unique(group_B, return_inverse=True)
        groups = [self.request(group) for group in used.tolist() if group >= 0]
        return groups, index_B - (len(groups) < len(used))  # -1 comes first

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Ahead(Generic[T]):
    """Items of an iterator, made in a thread of its own, at most `capacity` before they are taken."""

    def __init__(self, items: Iterator[T], capacity: int) -> None:
        self.wait_seconds = 0.0  # that take() has stood still
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._queue: queue.Queue[T | BaseException] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._run, args=(items,), name="gr-collate", daemon=True)
        self._thread.start()

    def take(self) -> T:
        """The next item. Raises what the iterator raised, again at every call; there must be a next one."""
        if self.error is not None:
            raise self.error
        started = time.perf_counter()
        got = self._queue.get()
        self.wait_seconds += time.perf_counter() - started
        if isinstance(got, BaseException):
            self.error = got
            self.close()
            raise got
        return got

    def close(self) -> None:
        """Stops the thread and ends the iterator. Safe to call twice."""
        self._stop.set()
        self._thread.join()

    def _run(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                self._put(item)
                if self._stop.is_set():
                    break
        except BaseException as error:
            self._put(error)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    def _put(self, item: T | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
