"""The cache of users' keys and values: whose entry is used, what is counted, and what leaves first."""

import torch

from gr.serving.verbs.kv_cache import Entry, KVCache

SHAPE = (2, 1, 4)
ROW = 2 * 1 * 4 * 4  # bytes


def digest(events: int) -> bytes:
    return bytes([events])


def entry(events: int, *, version: str = "v1", rows: int | None = None) -> Entry:
    return Entry(version, digest(events), events, events, torch.zeros(rows or events, *SHAPE))


def test_outcomes_are_counted() -> None:
    cache = KVCache(10_000)
    assert cache.take("a", "v1", 3, digest) is None
    for held, asked, outcome in [
        (entry(3), 3, "hit"),
        (entry(3), 5, "extended"),
        (entry(3, version="v0"), 3, "other_version"),
        (entry(3), 2, "shorter"),
        (Entry("v1", b"other", 3, 3, torch.zeros(3, *SHAPE)), 4, "changed"),
    ]:
        cache.counts.clear()
        cache.put("a", held)
        taken = cache.take("a", "v1", asked, digest)
        assert cache.counts == {outcome: 1}
        assert (taken is held) == (outcome in ("hit", "extended"))
        assert len(cache) == 0 and cache.bytes == 0, "an entry in use is its user's alone"


def test_the_least_recently_used_leave_first() -> None:
    cache = KVCache(10 * ROW)
    for user in "abc":
        cache.put(user, entry(3))
    held = cache.take("a", "v1", 3, digest)
    assert held is not None
    cache.put("a", held)
    cache.put("d", entry(4))
    assert cache.take("b", "v1", 3, digest) is None
    assert cache.bytes == 10 * ROW and cache.counts["evicted"] == 1
    cache.put("e", entry(11))
    assert cache.counts["too_large"] == 1 and len(cache) == 3


def test_an_entry_grows() -> None:
    grown = entry(3)
    rows = torch.randn(70, *SHAPE)
    grown.append(rows, 70, digest(73))
    assert (grown.tokens, grown.events, grown.digest) == (73, 73, digest(73))
    assert torch.equal(grown.kv_NLHW[3:73], rows) and not grown.kv_NLHW[:3].any()
    held = grown.kv_NLHW
    entry_rows = len(held)
    grown.append(rows[:1], 1, digest(74))
    assert len(grown.kv_NLHW) >= entry_rows and torch.equal(grown.kv_NLHW[73], rows[0])
