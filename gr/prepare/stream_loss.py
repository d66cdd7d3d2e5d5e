"""The least expected loss of a model of the Dirichlet stream (synthetic.py): that of exact inference from the history.

The prior H and the strength alpha of a record are integrated out. With n_c events of category c, H ~ Dirichlet(1, ...)
over k categories, and the urn's rising factorials written as sums over s(n, j), the unsigned Stirling numbers,

    p(categories | k, alpha) = (k - 1)! / alpha^(N) * sum over j of prod_c s(n_c, j_c) j_c! alpha^J / (k - 1 + J)!,

where J is the sum of the j_c and alpha^(N) a rising factorial: a polynomial in alpha, by convolution over categories.

B records, N events of a record, G slots for its categories, A nodes of the quadrature over alpha.
"""

import math

import numpy as np
from scipy.special import gammaln, logsumexp

SLOTS = 5
LEAST_ALPHA, LARGEST_ALPHA = 1.0, 500.0
_NODES = 32


def mean_losses(count_BG: np.ndarray, first_B: np.ndarray, size_BG: np.ndarray, categories: int) -> np.ndarray:
    """Nats an event, the first of each record left out, float64 [B].

    count_BG: events of each slot. first_B: slot of the first event. size_BG: items of the slot's category.
    """
    N = int(count_BG[0].sum())
    items_BG = np.log(np.maximum(size_BG, 1))
    first_item_B = np.take_along_axis(items_BG, first_B[:, None], axis=1)[:, 0]
    of_categories_B = -math.log(categories) - _log_probability(count_BG, categories)  # the first is uniform
    return (of_categories_B + (count_BG * items_BG).sum(1) - first_item_B) / (N - 1)


def _log_probability(count_BG: np.ndarray, categories: int) -> np.ndarray:
    """log p(the categories of a record's events, in their order), float64 [B]."""
    N = int(count_BG[0].sum())
    table = _stirling(N)
    sum_BJ = np.zeros((len(count_BG), N + 1))
    sum_BJ[:, 0] = 1.0
    for count_B in count_BG.T:
        added_BJ = np.zeros_like(sum_BJ)
        for j in range(int(count_B.max()) + 1):
            added_BJ[:, j:] += table[count_B, j, None] * sum_BJ[:, : N + 1 - j]
        sum_BJ = added_BJ
    with np.errstate(divide="ignore"):  # log 0 of a J that no counts have
        log_BJ = np.log(sum_BJ) + gammaln(count_BG + 1.0).sum(1)[:, None]
    node_A, weight_A = np.polynomial.legendre.leggauss(_NODES)
    low, high = math.log(LEAST_ALPHA), math.log(LARGEST_ALPHA)
    alpha_A = np.exp(low + (high - low) * (node_A + 1) / 2)
    # alpha is uniform, and the nodes lie in its logarithm.
    log_weight_A = np.log(weight_A * (high - low) / 2 * alpha_A / (LARGEST_ALPHA - LEAST_ALPHA))
    log_weight_A -= gammaln(alpha_A + N) - gammaln(alpha_A)
    J = np.arange(N + 1)
    seen_B = (count_BG > 0).sum(1)
    terms = []
    for k in range(1, SLOTS + 1):
        of_alpha_BA = [logsumexp(log_BJ + J * math.log(alpha) - gammaln(k + J), axis=1) for alpha in alpha_A]
        of_k_B = logsumexp(np.stack(of_alpha_BA, 1) + log_weight_A, axis=1) + gammaln(k)
        terms.append(np.where(seen_B <= k, of_k_B + _log_sets(categories, k, seen_B), -np.inf))
    return logsumexp(np.stack(terms, 1), axis=1) - math.log(SLOTS)


def _log_sets(categories: int, k: int, seen_B: np.ndarray) -> np.ndarray:
    """log of the share of the sets of k categories that hold those seen."""
    log_share = [0.0]
    for m in range(k):
        log_share.append(log_share[-1] + math.log((k - m) / (categories - m)))
    return np.array(log_share)[np.minimum(seen_B, k)]


def _stirling(N: int) -> np.ndarray:
    """s(n, j) j! / n!, float64 [N + 1, N + 1], which stays near 1."""
    table = np.zeros((N + 1, N + 1))
    table[0, 0] = 1.0
    j = np.arange(1, N + 1)
    for n in range(N):
        table[n + 1] = n * table[n]
        table[n + 1, 1:] += j * table[n, :-1]
        table[n + 1] /= n + 1
    return table
