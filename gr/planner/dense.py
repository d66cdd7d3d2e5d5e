"""Parameters, FLOPs and kept activations of the dense part, for one rank and step.

One multiply-add is two FLOPs. Backward costs twice the forward matrix products, and 2.5 times the forward of attention,
whose scores are computed again (5 products for 2). A causal sequence of n tokens has n (n + 1) / 2 scores, n being the
mean length: with lengths that vary, the mean of n^2 is above the square of the mean, and so is the attention's work.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from gr.config.inventory import DLRMDense, GivenDense, HSTUDense, InventoryConfig, LossInventory, TransformerDense

BYTES = {"fp32": 4, "bf16": 2}
BACKWARD_OF_MATMUL = 2.0
BACKWARD_OF_ATTENTION = 2.5
Length = TypeVar("Length", float, np.ndarray)
SCORE_BYTES = 4  # losses are computed in fp32


@dataclass(frozen=True)
class DenseWork:
    """All but `parameters` are of one rank and step. logits_bytes: scores of the loss and their gradient."""

    parameters: int
    forward_flops: float
    backward_flops: float
    activation_bytes: float  # kept for backward
    tokens: float  # of the sequence; 0 without one
    logits_bytes: float


@dataclass(frozen=True)
class _PerExample:
    """What one example takes. matmul_flops, attention_flops: forward."""

    parameters: int
    matmul_flops: float
    attention_flops: float
    activation_bytes: float
    tokens: float
    score_flops: float = 0.0


def dense_work(inventory: InventoryConfig, rank_batch_size: int) -> DenseWork:
    """What `rank_batch_size` examples cost."""
    one = _per_example(inventory)
    matmul = one.matmul_flops + one.score_flops
    return DenseWork(
        parameters=one.parameters,
        forward_flops=rank_batch_size * (matmul + one.attention_flops),
        backward_flops=rank_batch_size * (BACKWARD_OF_MATMUL * matmul + BACKWARD_OF_ATTENTION * one.attention_flops),
        activation_bytes=rank_batch_size * one.activation_bytes,
        tokens=rank_batch_size * one.tokens,
        logits_bytes=_logits_bytes(inventory.loss, rank_batch_size, one.tokens),
    )


def sequence_flops(inventory: InventoryConfig, lengths_B: np.ndarray) -> np.ndarray:
    """FLOPs of sequences of these lengths in tokens, forward and backward, float64 [B]. The dense part is a tower."""
    one = _per_example(inventory)
    matmul = (1 + BACKWARD_OF_MATMUL) * (one.matmul_flops + one.score_flops)
    attention = (1 + BACKWARD_OF_ATTENTION) * one.attention_flops
    return lengths_B * (matmul / one.tokens) + _causal_scores(lengths_B) * (attention / _causal_scores(one.tokens))


def _per_example(inventory: InventoryConfig) -> _PerExample:
    element, scores = BYTES[inventory.precision], inventory.loss.scores_per_example
    match inventory.dense:
        case HSTUDense() as dense:
            return _hstu(dense, element, scores)
        case TransformerDense() as dense:
            return _transformer(dense, element, scores)
        case DLRMDense() as dense:
            pooled = sum(table.features for table in inventory.tables if table.kind == "pooled")
            return _dlrm(dense, pooled, element)
        case GivenDense() as dense:
            return _PerExample(
                dense.parameters, dense.forward_flops_per_example, 0.0, dense.activation_bytes_per_example, 0.0
            )


def _logits_bytes(loss: LossInventory, rank_batch_size: int, tokens: float) -> float:
    if loss.tokens_at_once is None or not tokens:
        return 2 * SCORE_BYTES * rank_batch_size * loss.scores_per_example
    # A chunked loss has one buffer, in which the gradient takes the place of the scores.
    return SCORE_BYTES * min(loss.tokens_at_once, rank_batch_size * tokens) * loss.scores_per_example / tokens


def _hstu(dense: HSTUDense, element: int, scores: float) -> _PerExample:
    """W_uvqk [D, 2 H (V + Q)], W_o [H V or 3 H V, D] and its bias, as in arXiv 2402.17152, Eq. 1-3."""
    D, HQ, HV = dense.dim, dense.heads * dense.qk_dim, dense.heads * dense.v_dim
    gated = HV * (3 if dense.concat_ua else 1)
    matrices = D * (2 * HV + 2 * HQ) + gated * D
    # The paper's 2d + 2d + 4 h d_qk + 4 h d_v + 2 h d_v bytes in bf16: input, its norm, U V Q K, attention's output.
    kept = element * (2 * D + 2 * HQ + 3 * HV)
    if not dense.recompute:
        # The research form: the input, U V Q K before and after SiLU, attention's output. Where W_o reads three parts,
        # also the norm of that output, what enters W_o, and dropout's mask, a byte an element on CUDA.
        kept = element * (D + 2 * (2 * HQ + 2 * HV) + HV)
        if dense.concat_ua:
            kept += element * (HV + gated) + gated
    n = dense.mean_length
    return _PerExample(
        parameters=dense.layers * (matrices + D) + dense.other_parameters,
        matmul_flops=dense.layers * n * 2 * matrices,
        attention_flops=dense.layers * _causal_scores(n) * 2 * (HQ + HV),
        activation_bytes=dense.layers * n * kept,
        tokens=n,
        score_flops=2 * D * scores,
    )


def _transformer(dense: TransformerDense, element: int, scores: float) -> _PerExample:
    """Attention (D x D for queries and output, D x D kv_heads / heads for keys and values), feed-forward, two norms."""
    D = dense.dim
    KV = D // dense.heads * (dense.kv_heads or dense.heads)
    matrices = 2 * D * D + 2 * D * KV + (3 if dense.gated else 2) * D * dense.ffn_dim
    # 33 d in bf16 for ffn_dim = 4 D and no gate, as arXiv 2402.17152 counts: input and its norm, q k v, attention's
    # output, the feed-forward's input and its norm (2 bytes each), a dropout mask (1), and two hidden states of the
    # feed-forward. A gate adds two: the other factor and the product.
    hidden = 4 if dense.gated else 2
    kept = element * (6 * D + 2 * KV + hidden * dense.ffn_dim) + D
    n = dense.mean_length
    return _PerExample(
        parameters=dense.layers * (matrices + 2 * D) + D + dense.other_parameters,
        matmul_flops=dense.layers * n * 2 * matrices,
        attention_flops=dense.layers * _causal_scores(n) * 4 * D,
        activation_bytes=dense.layers * n * kept,
        tokens=n,
        score_flops=2 * D * scores,
    )


def _causal_scores(length: Length) -> Length:
    return length * (length + 1.0) / 2.0


def _dlrm(dense: DLRMDense, pooled_features: int, element: int) -> _PerExample:
    """MLPs with biases; dot: all pairs of F + 1 vectors (arXiv 1906.00091); dcn: low-rank cross net, W (V x) + b."""
    vectors, D = pooled_features + 1, dense.dim
    flat = vectors * D
    matrices = biases = 0
    kept = 0.0
    width, interaction_flops = flat, 0.0
    layers: list[tuple[int, int]] = []
    if dense.interaction == "projection":
        layers = [*pairwise((flat, *dense.branch1)), *pairwise((flat, *dense.branch2))]
        width = D + (dense.branch1[-1] // D) * (dense.branch2[-1] // D)
        interaction_flops = 2.0 * (width - D) * D
        kept += dense.branch1[-1] + dense.branch2[-1]
    elif dense.interaction == "dot":
        width = D + vectors * (vectors + (1 if dense.self_interaction else -1)) // 2
        interaction_flops = 2.0 * vectors * vectors * D
        kept += flat
    elif dense.interaction == "dcn":
        matrices += dense.dcn_layers * 2 * flat * dense.dcn_rank
        biases += dense.dcn_layers * flat
        # Of a layer: its input, the low-rank vector, and the factor of x_0.
        kept += dense.dcn_layers * (2 * flat + dense.dcn_rank)
    layers += [*pairwise((dense.dense_features, *dense.bottom)), *pairwise((width, *dense.top))]
    for into, out in layers:
        matrices += into * out
        biases += out
        kept += into
    return _PerExample(
        parameters=matrices + biases,
        matmul_flops=2.0 * matrices + interaction_flops,
        attention_flops=0.0,
        activation_bytes=element * kept,
        tokens=0.0,
    )
