"""One training step on MovieLens-1M with HSTU, SASRec and Llama of as many FLOPs a token.

Forward, loss, backward and update of configs/retrieval/ml-1m-{hstu,sasrec,llama}.yaml, on the same batches:
`gr prepare movielens-1m` wrote them, --data names the folder. HSTU is wider than in its file, for as many FLOPs.
"""

import functools
from collections.abc import Callable, Iterator

from benchmarks.case import Case, Options, lazy
from benchmarks.retrieval import alone, first_batches, steps
from gr.config import load_config
from gr.config.retrieval import RetrievalConfig

TESTS = ("tests/unit/towers/test_hstu.py", "tests/unit/towers/test_sasrec.py", "tests/unit/towers/test_llama.py")
TOWERS = {"hstu": ["model.tower.qk_dim=56", "model.tower.v_dim=56"], "sasrec": [], "llama": []}
BATCHES = 8


def cases(options: Options) -> list[Case]:
    variants = {tower: lazy(functools.partial(_steps, configured(tower, options), options)) for tower in TOWERS}
    return [Case("training step, batch 128, N 200", variants, "hstu", rounds=3)]


def notes(options: Options) -> Iterator[str]:
    """The FLOPs of each tower, by the formula that the planner and the load balance use."""
    for tower in TOWERS:
        config = configured(tower, options)
        N = config.data.max_length
        cost = config.model.tower.cost(config.model.dim, N, 4)
        flops = cost.token_flops + cost.score_flops * (N + 1) / 2
        yield f"{tower}: {flops:,.0f} FLOPs a token forward at {N} tokens, {cost.parameters:,} parameters."


def configured(tower: str, options: Options, *overrides: str) -> RetrievalConfig:
    """configs/retrieval/ml-1m-TOWER.yaml, of as many FLOPs as the others."""
    if options.data is None:
        raise SystemExit("this benchmark needs --data FOLDER, as `gr prepare movielens-1m --out FOLDER` writes it")
    common = [f"data.path={options.data}", f"device={options.device}", *TOWERS[tower]]
    config = load_config(f"configs/retrieval/ml-1m-{tower}.yaml", [*common, *overrides])
    assert isinstance(config, RetrievalConfig)
    return config


def _steps(config: RetrievalConfig, options: Options) -> Callable[[], object]:
    return steps(config, alone(options.device), first_batches(config, alone(options.device), BATCHES))
