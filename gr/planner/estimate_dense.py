"""Parameters, FLOPs and kept activations of the dense part, for one rank and step.

One multiply-add is two FLOPs. Backward costs twice the forward matrix products, and 2.5 times the forward of attention,
whose scores are computed again (5 products for 2). A causal sequence of n tokens has n (n + 1) / 2 scores, n being the
mean length: with lengths that vary, the mean of n^2 is above the square of the mean, and so is the attention's work.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gr.config.inventory import DLRMDense, GivenDense, InventoryConfig, LossInventory, TowerDense

BYTES = {"fp32": 4, "bf16": 2}
BACKWARD_OF_MATMUL = 2.0
BACKWARD_OF_ATTENTION = 2.5
Length = TypeVar("Length", float, np.ndarray)
WIDE_INPUTS = 4  # of a layer of Llama: those of attention and of the feed-forward, before and after their norms
SCORE_BYTES = 4  # losses are computed in fp32


@dataclass(frozen=True)
class DenseWork:
    """The work of one rank in one step. logits_bytes: scores of the loss and their gradient.

    tower_parameters: of `parameters`; matrix_parameters: of those, the ones that tensor parallelism splits.
    replicated_parameters: those that every rank has, also under FSDP. The rest are the heads'.
    """

    parameters: int
    forward_flops: float
    backward_flops: float
    activation_bytes: float  # kept for backward
    tokens: float  # 0 where the dense part reads no sequence
    logits_bytes: float
    tower_parameters: int = 0
    matrix_parameters: int = 0
    replicated_parameters: int = 0


@dataclass(frozen=True)
class _PerExample:
    """The work of one example, FLOPs of the forward pass. score_flops: of the loss.

    again_flops: of what the backward pass computes again.
    """

    parameters: int
    matmul_flops: float
    attention_flops: float
    activation_bytes: float
    tokens: float
    score_flops: float = 0.0
    again_flops: float = 0.0
    tower_parameters: int = 0
    matrix_parameters: int = 0
    replicated_parameters: int = 0


def dense_work(inventory: InventoryConfig, rank_batch_size: int) -> DenseWork:
    """The work of `rank_batch_size` examples on one rank."""
    one = _per_example(inventory)
    matmul = one.matmul_flops + one.score_flops
    backward = BACKWARD_OF_MATMUL * matmul + BACKWARD_OF_ATTENTION * one.attention_flops + one.again_flops
    return DenseWork(
        parameters=one.parameters,
        forward_flops=rank_batch_size * (matmul + one.attention_flops),
        backward_flops=rank_batch_size * backward,
        activation_bytes=rank_batch_size * one.activation_bytes,
        tokens=rank_batch_size * one.tokens,
        logits_bytes=_logits_bytes(inventory.loss, rank_batch_size, one.tokens),
        tower_parameters=one.tower_parameters,
        matrix_parameters=one.matrix_parameters,
        replicated_parameters=one.replicated_parameters,
    )


def sequence_flops(inventory: InventoryConfig, lengths_B: np.ndarray) -> np.ndarray:
    """FLOPs of sequences of lengths_B tokens, forward and backward, float64 [B]. The dense part is a tower."""
    one = _per_example(inventory)
    matmul = (1 + BACKWARD_OF_MATMUL) * (one.matmul_flops + one.score_flops)
    attention = (1 + BACKWARD_OF_ATTENTION) * one.attention_flops
    return lengths_B * (matmul / one.tokens) + _causal_scores(lengths_B) * (attention / _causal_scores(one.tokens))


def _per_example(inventory: InventoryConfig) -> _PerExample:
    element, dense = BYTES[inventory.precision], inventory.dense
    match dense:
        case TowerDense():
            n = dense.mean_length
            cost = dense.tower.cost(dense.dim, dense.max_length, element)
            layers, tensor = dense.tower.layers, inventory.tensor_parallel
            attention, again = _causal_scores(n) * cost.score_flops, 0.0
            # Of the other ranks' tokens, what is D wide; the parts of what is split make one whole.
            kept = cost.kept_bytes + (tensor - 1) * layers * WIDE_INPUTS * element * dense.dim
            if inventory.activation_checkpointing == "layer":
                # The fp32 input of every layer, and all that one layer keeps while its gradients are computed.
                kept = min(kept, tensor * layers * BYTES["fp32"] * dense.dim + kept / layers)
                again = n * cost.token_flops + attention
            return _PerExample(
                parameters=cost.parameters + dense.other_parameters,
                tower_parameters=cost.parameters,
                matrix_parameters=round(cost.token_flops / 2),
                replicated_parameters=dense.replicated_parameters,
                matmul_flops=n * cost.token_flops,
                attention_flops=attention,
                activation_bytes=n * kept,
                again_flops=again,
                tokens=n,
                score_flops=2 * dense.dim * inventory.loss.scores_per_example,
            )
        case DLRMDense():
            cost = dense.cost(dense.dense_features, inventory.interacting_features, element)
            return _PerExample(cost.parameters, cost.token_flops, 0.0, cost.kept_bytes, 0.0)
        case GivenDense():
            return _PerExample(
                dense.parameters, dense.forward_flops_per_example, 0.0, dense.activation_bytes_per_example, 0.0
            )


def _logits_bytes(loss: LossInventory, rank_batch_size: int, tokens: float) -> float:
    if loss.tokens_at_once is None or not tokens:
        return 2 * SCORE_BYTES * rank_batch_size * loss.scores_per_example
    # A chunked loss has one buffer, in which the gradient takes the place of the scores.
    return SCORE_BYTES * min(loss.tokens_at_once, rank_batch_size * tokens) * loss.scores_per_example / tokens


def _causal_scores(length: Length) -> Length:
    return length * (length + 1.0) / 2.0
