"""Training objectives: what a tower's outputs are compared with, and how."""

from gr.tasks.negatives import Candidates, CandidateSampler
from gr.tasks.ranks import CorpusRanker
from gr.tasks.retrieval import retrieval_loss
from gr.tasks.similarity import Cosine, DotProduct, Similarity, build_similarity

__all__ = [
    "CandidateSampler",
    "Candidates",
    "CorpusRanker",
    "Cosine",
    "DotProduct",
    "Similarity",
    "build_similarity",
    "retrieval_loss",
]
