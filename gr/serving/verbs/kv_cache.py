"""Keys and values of users' histories, kept from one request to the next within a budget of bytes.

N rows of an entry, L layers, H heads, W the widths of a key and a value together.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

_ROWS = 64  # an entry grows by so many rows at least


@dataclass
class Entry:
    """kv_NLHW: rows of the first `tokens` tokens, and room for more. events: of the history, and digest: of these
    events and of what else their keys and values were computed from. version: of the model that computed them."""

    version: str
    digest: bytes
    events: int
    tokens: int
    kv_NLHW: Tensor

    def append(self, kv_TLHW: Tensor, events: int, digest: bytes) -> None:
        """Adds the tokens of `events` further events; digest: of all events from now on."""
        needed = self.tokens + kv_TLHW.shape[0]
        if needed > self.kv_NLHW.shape[0]:
            rows = max(needed, self.kv_NLHW.shape[0] * 3 // 2, self.kv_NLHW.shape[0] + _ROWS)
            wider = self.kv_NLHW.new_empty(rows, *self.kv_NLHW.shape[1:])
            wider[: self.tokens] = self.kv_NLHW[: self.tokens]
            self.kv_NLHW = wider
        self.kv_NLHW[self.tokens : needed] = kv_TLHW
        self.tokens, self.events, self.digest = needed, self.events + events, digest

    @property
    def bytes(self) -> int:
        return self.kv_NLHW.numel() * self.kv_NLHW.element_size()


class KVCache:
    """Entries by user, of which the least recently used leave first. May be called by several threads.

    counts, of requests: hit (the whole history was cached), extended (its newest events were not), missed (no entry);
    and where there was an entry that could not be used: other_version, shorter (it has more events than the request),
    changed (its events are not the first ones of the request, as when a full window has moved on). Of entries: evicted,
    too_large (for the whole budget).
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes, self.bytes = budget_bytes, 0
        self.counts: Counter[str] = Counter()
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, user: Hashable, version: str, events: int, digest: Callable[[int], bytes]) -> Entry | None:
        """The user's entry, if it was computed by `version` from the first events of this history.

        events: of the history. digest: of its first so many. The entry is the caller's until it is put back: another
        request of the user meanwhile finds none, and an entry that cannot be used is gone.
        """
        with self._lock:
            entry = self._entries.pop(user, None)
            if entry is not None:
                self.bytes -= entry.bytes
        outcome = self._outcome(entry, version, events, digest)
        with self._lock:
            self.counts[outcome] += 1
        return entry if outcome in ("hit", "extended") else None

    @staticmethod
    def _outcome(entry: Entry | None, version: str, events: int, digest: Callable[[int], bytes]) -> str:
        if entry is None:
            return "missed"
        if entry.version != version:
            return "other_version"
        if entry.events > events:
            return "shorter"
        if entry.digest != digest(entry.events):
            return "changed"
        return "hit" if entry.events == events else "extended"

    def put(self, user: Hashable, entry: Entry) -> None:
        """Keeps the entry as the newest one, and drops the oldest ones beyond the budget."""
        with self._lock:
            if entry.bytes > self.budget_bytes:
                self.counts["too_large"] += 1
                return
            if (replaced := self._entries.pop(user, None)) is not None:
                self.bytes -= replaced.bytes
            self._entries[user] = entry
            self.bytes += entry.bytes
            while self.bytes > self.budget_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.bytes -= oldest.bytes
                self.counts["evicted"] += 1


def no_entry(layers: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """Keys and values of no token: one row of room, since compiled code takes no empty tensor."""
    return torch.zeros(1, layers, heads, width, dtype=dtype)
