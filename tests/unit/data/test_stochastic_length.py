"""Stochastic length: who is cut, to what length, and which events stay."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.config.histories import StochasticLength
from gr.data.stochastic_length import Draws, random_ends, stochastic_length

N = 256
SELECTORS = ("greedy", "random", "weighted")


def kept(lengths: list[int], selector: str, alpha: float = 1.6, seed: int = 1, first: int = 0) -> list[np.ndarray]:
    length_B = np.array(lengths, dtype=np.int64)
    ages = [np.arange(length - 1, -1, -1) for length in lengths]
    config = StochasticLength(alpha=alpha, selector=selector)  # type: ignore[arg-type]
    draws = Draws(seed, first + np.arange(len(lengths)))
    keep_T = stochastic_length(length_B, np.concatenate([*ages, np.empty(0)]), config, N, draws)
    return np.split(keep_T, np.cumsum(length_B)[:-1])


@settings(max_examples=100)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=6), st.sampled_from(SELECTORS), st.integers(0, 9))
def test_a_history_stays_whole_or_is_cut_to_one_length(lengths: list[int], selector: str, seed: int) -> None:
    longest = N ** (1.6 / 2)
    for length, keep in zip(lengths, kept(lengths, selector, seed=seed), strict=True):
        assert keep.sum() == length or (length > longest and keep.sum() == int(longest))


def test_rate_of_whole_histories() -> None:
    """N^alpha / n^2 of the paper, at n = N and n = N / 2."""
    for length in (N, N // 2):
        whole = np.mean([keep.all() for keep in kept([length] * 4000, "random")])
        assert whole == pytest.approx(N**1.6 / length**2, abs=0.02)


def test_length_of_the_paper() -> None:
    """alpha = 1.6 and N = 4096 give 776 tokens (arXiv 2402.17152, section 4.2)."""
    config, draws = StochasticLength(alpha=1.6, selector="greedy"), Draws(1, np.arange(50))
    keep_T = stochastic_length(np.full(50, 4096), np.zeros(50 * 4096), config, 4096, draws)
    assert set(keep_T.reshape(50, -1).sum(1).tolist()) <= {776, 4096}


def test_alpha_2_keeps_everything() -> None:
    assert all(keep.all() for keep in kept([N, N - 1, 3], "random", alpha=2.0))


def test_greedy_keeps_the_newest() -> None:
    for keep in kept([N] * 50, "greedy"):
        assert keep.all() or (keep[-84:].all() and keep.sum() == 84)


def test_random_keeps_any_event_alike() -> None:
    shares = np.mean([keep for keep in kept([N] * 4000, "random") if not keep.all()], axis=0)
    assert np.abs(shares - 84 / N).max() < 0.05


def test_weighted_prefers_the_young() -> None:
    """One draw of one event is at rates 1 - f / sum f: with three ages 0, 1 and 3, 1, 3/4 and 1/4 over 2."""
    config = StochasticLength(alpha=1.01, selector="weighted")
    draws = Draws(1, np.arange(20_000))
    ages = np.tile([3, 1, 0], 20_000)
    keep_T = stochastic_length(np.full(20_000, 3), ages, config, 2, draws).reshape(-1, 3)
    cut = keep_T[keep_T.sum(1) == 1]
    assert cut.mean(0) == pytest.approx([1 / 8, 3 / 8, 1 / 2], abs=0.015)


def test_draws_do_not_depend_on_batch_mates() -> None:
    together = kept([N, N, N], "random")
    alone = kept([N], "random", first=2)
    assert (together[2] == alone[0]).all()
    assert (together[0] != together[1]).any()
    assert (kept([N], "random", seed=2)[0] != together[0]).any()


def test_random_ends_are_uniform() -> None:
    ends = random_ends(np.full(60_000, 6), Draws(1, np.arange(60_000)))
    assert np.bincount(ends, minlength=7)[1:] / 60_000 == pytest.approx([1 / 6] * 6, abs=0.01)
    assert np.bincount(ends, minlength=7)[0] == 0
    assert random_ends(np.array([0, 1]), Draws(1, np.arange(2))).tolist() == [0, 1]
