"""A training step of HSTU, SASRec and Llama of as many FLOPs, over the length of the sequences and over the batch.

The towers are those of benchmarks.towers; every sequence is full and its items are drawn evenly. Lengths: 16,384 tokens
a step whatever the length, so that what grows is attention. Batches: sequences of 200 tokens, so that what falls is the
cost of a step that has nothing to do with its tokens. --data names what `gr prepare movielens-1m` wrote.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torchrec import KeyedJaggedTensor

from benchmarks import towers
from benchmarks.case import Case, Options, lazy
from benchmarks.machine import Peaks
from benchmarks.picture import label, lines, panels
from benchmarks.results import Row
from benchmarks.retrieval import alone, steps
from gr.batch import ITEM_FEATURE, RetrievalBatch
from gr.data.dataset import Dataset
from gr.dist import keep_freed_memory

TESTS = towers.TESTS
LENGTHS, TOKENS = (256, 512, 1024, 2048, 4096, 8192), 16_384
BATCHES, LENGTH = (8, 32, 128, 512, 2048), 200


def cases(options: Options) -> list[Case]:
    keep_freed_memory()  # as `gr train` does: else the kernel clears pages for half of a step of 2,048 sequences
    by_length = [_case(options, TOKENS // N, N, f"{N} tokens a sequence", "length", N) for N in LENGTHS]
    return by_length + [_case(options, B, LENGTH, f"batch {B}", "batch", B) for B in BATCHES]


def _case(options: Options, B: int, N: int, name: str, series: str, at: int) -> Case:
    variants = {tower: lazy(functools.partial(_steps, tower, options, B, N)) for tower in towers.TOWERS}
    return Case(name, variants, "hstu", rounds=3, warmups=1, series=series, at=at)


def _steps(tower: str, options: Options, B: int, N: int) -> Callable[[], object]:
    sizes = (f"data.max_length={N}", f"trainer.global_batch_size={B}", "data.lanes=1")
    config = towers.configured(tower, options, *sizes)
    corpus_C = torch.tensor(Dataset.open(config.data.path).corpus()[0])
    drawn_BN = corpus_C[torch.randint(len(corpus_C), (B, N + 1), generator=torch.Generator().manual_seed(0))]
    inputs, targets = drawn_BN[:, :-1].flatten(), drawn_BN[:, 1:].flatten()
    features = KeyedJaggedTensor([ITEM_FEATURE], inputs, lengths=torch.full((B,), N))
    here = alone(options.device)
    return steps(config, here, [RetrievalBatch(features, targets, None, None, 0).to(here.device)])


def draw(cases: Sequence[Case], rows: Sequence[Row], found: Peaks, path: Path) -> None:
    """Microseconds a token, over both."""
    figure, both = panels(2, (12, 5))
    for axes, series, x in zip(both, ("length", "batch"), ("tokens of a sequence", "sequences a step"), strict=True):
        tokens = {c.name: TOKENS if series == "length" else c.at * LENGTH for c in cases if c.series == series}
        places = {c.name: c.at for c in cases if c.series == series}
        lines(axes, places, rows, lambda row, tokens=tokens: row.seconds.median * 1e6 / tokens[row.case])
        label(axes, x, "microseconds a token, a whole step")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
