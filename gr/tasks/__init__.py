"""Training objectives: losses, negatives, similarities, and the place of a target in the whole corpus."""

from gr.tasks.corpus_rank import CorpusRanker
from gr.tasks.losses import click_loss, multitask_loss, retrieval_loss
from gr.tasks.negatives import Candidates, CandidateSampler
from gr.tasks.policy import Prompts, Rollout
from gr.tasks.preference import Pairs, kl_divergence, preference_loss
from gr.tasks.similarity import Cosine, DotProduct, MixtureOfLogits, Similarity, build_similarity, require_product

__all__ = [
    "CandidateSampler",
    "Candidates",
    "CorpusRanker",
    "Cosine",
    "DotProduct",
    "MixtureOfLogits",
    "Pairs",
    "Prompts",
    "Rollout",
    "Similarity",
    "build_similarity",
    "click_loss",
    "kl_divergence",
    "multitask_loss",
    "preference_loss",
    "require_product",
    "retrieval_loss",
]
