"""The loss of exact inference on the Dirichlet stream, against sums over all sequences and draws of the latents."""

import math
from itertools import product

import numpy as np
import pytest

from gr.prepare.stream_loss import LARGEST_ALPHA, LEAST_ALPHA, SLOTS, _log_probability, mean_losses

CATEGORIES, EVENTS = 6, 4


def counts(sequence: tuple[int, ...]) -> list[int]:
    seen = [sequence.count(category) for category in dict.fromkeys(sequence)]
    return seen + [0] * (SLOTS - len(seen))


def test_probabilities_of_all_sequences_sum_to_one() -> None:
    every = np.array([counts(sequence) for sequence in product(range(CATEGORIES), repeat=EVENTS)])
    assert np.exp(_log_probability(every, CATEGORIES)).sum() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("sequence", [(0, 0, 0, 0), (0, 1, 0, 1), (0, 1, 2, 3)])
def test_probability_is_the_mean_over_draws_of_the_latents(sequence: tuple[int, ...]) -> None:
    random, draws = np.random.default_rng(0), 100_000
    alpha_M = random.uniform(LEAST_ALPHA, LARGEST_ALPHA, draws)
    place_MC = np.argsort(random.random((draws, CATEGORIES)), axis=1)
    prior_MC = random.standard_exponential((draws, CATEGORIES)) * (place_MC < random.integers(1, 6, draws)[:, None])
    prior_MC /= prior_MC.sum(1, keepdims=True)
    probability_M = np.ones(draws)
    for n, category in enumerate(sequence):
        earlier = sequence[:n].count(category)
        probability_M *= (alpha_M * prior_MC[:, category] + earlier) / (alpha_M + n)
    error = probability_M.std() / math.sqrt(draws)
    exact = math.exp(_log_probability(np.array([counts(sequence)]), CATEGORIES)[0])
    assert abs(probability_M.mean() - exact) < 4 * error


def test_items_are_uniform_in_their_category() -> None:
    count_BG, first_B = np.array([[3, 1, 0, 0, 0]]), np.array([1])
    alone = mean_losses(count_BG, first_B, np.array([[1, 1, 0, 0, 0]]), CATEGORIES)
    many = mean_losses(count_BG, first_B, np.array([[8, 5, 0, 0, 0]]), CATEGORIES)
    np.testing.assert_allclose(many - alone, [math.log(8)])  # the first event, of the other category, is not counted
