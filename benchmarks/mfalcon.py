"""M-FALCON: candidates against cached keys and values, beside one masked forward pass over history and candidates.

    python -m benchmarks.mfalcon [--lengths 1024 4096]                     CPU seconds of one thread, in turns
    python -m benchmarks.mfalcon --checkpoint RUN --data DIR [--users N]   answers over a ranking model's test users
    python -m benchmarks.mfalcon --checkpoint RUN --data DIR --package P   compiled passes beside the same in torch

The tower of the first is a STU of width 256 with 3 layers of 4 heads of 64. The second ranks the newest events of each
user of DIR by `rank` and by the model's own forward pass, then again in two parts, and with the second half of the
history appended to a cache of the first. The third asks with 100 events and 64 candidates of each of a few users.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gr
from benchmarks.compare import print_machine
from gr.batch import ITEM_FEATURE, RankingBatch
from gr.config.export import CacheDtype
from gr.config.ranking import RankingConfig
from gr.config.towers import STUConfig
from gr.data.collate_ranking import RankingCollate
from gr.data.dataset import Dataset
from gr.data.history_batches import UserBatches
from gr.data.vocabulary import Vocabulary
from gr.metrics.ranking import RankingMetrics
from gr.metrics.tasks import MultiTaskMetrics
from gr.models.saved import ALONE, Saved
from gr.models.sequence_ranking import SequenceRanker
from gr.ops.hstu_attention import CachedKeys, hstu_attention_cached, hstu_attention_start
from gr.sequence import JaggedSequence
from gr.serving.package.version import Version
from gr.serving.passes.ranking import ranking_form, ranking_passes
from gr.serving.passes.ranking_build import build
from gr.serving.verbs.kv_cache import KVCache
from gr.serving.verbs.ranking import CACHE_DTYPES, RankRequest, RankServable
from gr.towers.stu import STU
from tests.support.float_tables import FloatTables

D, H, LAYERS = 256, 4, 3
Q = D // H
MICROBATCH = 256
EVENTS, CANDIDATES, USERS, CALLS = 100, 64, 10, 20  # of `compiled`


class Served:
    """A tower and one user: n history tokens, m candidates."""

    def __init__(self, n: int, m: int) -> None:
        torch.manual_seed(0)
        config = STUConfig(layers=LAYERS, heads=H, qk_dim=Q, v_dim=Q, dropout=0.0)
        self.tower = STU(config, dim=D, max_length=32_768).eval()
        self.n, self.x_TD = n, torch.randn(n + m, D)
        self.sequence = JaggedSequence(self.x_TD, torch.tensor([0, n + m]), n + m, num_targets_B=torch.tensor([m]))
        self.settings = {"divisor": self.tower.divisor, "alpha": self.tower.alpha}
        self.length = torch.tensor([n])
        self.kv_LN2HQ = torch.randn(LAYERS, n, 2, H, Q)

    def full(self) -> Tensor:
        return self.tower(self.sequence).values_TD[self.n :]

    def prefill(self) -> None:
        x_TD = self.x_TD[: self.n]

        def attend(q: Tensor, k: Tensor, v: Tensor, /, layer: int = 0, **named: Tensor | None) -> Tensor:
            self.kv_LN2HQ[layer, :, 0], self.kv_LN2HQ[layer, :, 1] = k, v
            return hstu_attention_start(q, k, v, self.length, **self.settings)

        for place, layer in enumerate(self.tower.layers[:-1]):
            x_TD = layer(x_TD, partial(attend, layer=place))
        _, _, k, v = self.tower.layers[-1].project(x_TD)  # type: ignore[operator, union-attr]
        self.kv_LN2HQ[-1, :, 0], self.kv_LN2HQ[-1, :, 1] = k, v

    def score(self, microbatch: int) -> Tensor:
        return torch.cat([self._score(x_MD) for x_MD in self.x_TD[self.n :].split(microbatch)])

    def _score(self, x_MD: Tensor) -> Tensor:
        for layer, kv_N2HQ in zip(self.tower.layers, self.kv_LN2HQ, strict=True):
            cache = CachedKeys(kv_N2HQ[:, 0], kv_N2HQ[:, 1], self.length)
            x_MD = layer(x_MD, partial(hstu_attention_cached, cache=cache, candidates=True, **self.settings))
        return x_MD


def seconds(variants: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1) -> dict[str, float]:
    """Median CPU seconds of a call of each, in turns of so many calls."""
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            start = time.process_time()
            for _ in range(calls):
                run()
            if turn:  # the first warms up
                spent[name].append((time.process_time() - start) / calls)
    return {name: statistics.median(each) for name, each in spent.items()}


@torch.inference_mode()
def speed(lengths: Sequence[int], rounds: int) -> None:
    print("| history | candidates | one masked pass, ms | over cached score | cold (prefill + score) over it |")
    print("|---|---|---|---|---|")
    for n in lengths:
        for m in (32, 256, 1024):
            served = Served(n, m)
            full = served.full()
            served.prefill()
            torch.testing.assert_close(served.score(MICROBATCH), full, rtol=1e-4, atol=1e-4)
            variants = {"full": served.full, "score": partial(served.score, MICROBATCH), "prefill": served.prefill}
            took = seconds(variants, rounds)
            cold = (took["prefill"] + took["score"]) / took["full"]
            print(f"| {n} | {m} | {took['full'] * 1e3:.1f} | {took['full'] / took['score']:.1f}x | {cold:.2f}x |")
    print(
        "\n| history | candidates | microbatches of 32 / 128 / 512 over one call | prefill + score over a masked pass |"
    )
    print("|---|---|---|---|")
    for n, m in ((1024, 1024), (1024, 16_384)):
        served = Served(n, m)
        sizes = (m, 32, 128, 512)
        variants = {str(size): partial(served.score, size) for size in sizes}
        variants |= {"full": served.full, "prefill": served.prefill}
        took = seconds(variants, max(1, rounds // 2))
        ratios = " / ".join(f"{took[str(size)] / took[str(m)]:.2f}" for size in sizes[1:])
        print(f"| {n} | {m} | {ratios} | {(took['prefill'] + took['128']) / took['full']:.2f} |")


def requests(batch: RankingBatch, saved: Saved) -> Iterator[RankRequest]:
    """One a user: the events that are scored are the candidates, at the time of the first of them."""
    features = [ITEM_FEATURE, *saved.schema.event_features]
    names = list(saved.schema.contextual)
    lengths = batch.features[ITEM_FEATURE].lengths().tolist()
    columns = [batch.features[name].values() for name in features]
    times_T = torch.zeros_like(batch.actions_T) if batch.timestamps_T is None else batch.timestamps_T
    rows_TC = torch.stack([*columns, batch.actions_T, times_T], dim=1).numpy()
    stop = known = 0
    for example, (length, scored) in enumerate(zip(lengths, batch.scored_B.tolist(), strict=True)):
        start, stop = stop, stop + length
        if not scored:
            known += length > 0
            continue
        context = [int(batch.features[name].values()[known]) for name in names] or [0]
        known += 1
        rows = rows_TC[start:stop]
        history, candidates = rows[: length - scored], rows[length - scored :, : len(features)]
        numbers = batch.numeric_BK[example].numpy() if batch.numeric_BK.shape[1] else np.zeros(1, dtype=np.float32)
        yield RankRequest(
            str(int(batch.user_B[example])),
            history,
            np.array(context, dtype=np.int32),
            numbers,
            np.ascontiguousarray(candidates.T.astype(np.int32)),
            np.ones(scored, dtype=bool),
            int(rows[length - scored, -1]),
        )


def half(request: RankRequest) -> RankRequest:
    """The same user with the older half of the history."""
    return RankRequest(**{**vars(request), "events_EC": request.events_EC[: len(request.events_EC) // 2]})


def part(request: RankRequest, candidates: slice) -> RankRequest:
    own = {"candidates_FM": request.candidates_FM[:, candidates], "known_M": request.known_M[candidates]}
    return RankRequest(**{**vars(request), **own})


def newest_events(saved: Saved, data: Path, users: int = 256) -> UserBatches:
    """Batches of so many users with their newest events to be scored."""
    config: Any = saved.config
    collate = RankingCollate(saved.schema, config.data, config.task)
    return UserBatches(
        Dataset.open(data),
        config.data,
        partial(collate.newest, newest=config.evaluation.newest, before=0),
        columns=collate.columns,
        global_batch_size=users,
        rank=0,
        world_size=1,
    )


@torch.inference_mode()
def compiled(checkpoint: Path, data: Path, package: Path, rounds: int) -> None:
    """CPU time of a package's passes and answers, beside those of the modules that they were compiled from.

    In the last row, of a user's whole history and newest events, beside the checkpoint's own forward pass.
    """
    saved, version = gr.load(checkpoint), Version.open(package)
    rank = version.verbs["rank"]
    assert isinstance(rank, RankServable)
    kinds = {name: table.dtype for name, table in version.manifest.tables.items()}
    modules = {name: each.module for name, each in build(saved, kinds, version.manifest.export).passes.items()}
    passes = {name: lambda *inputs, each=each: [each(*inputs)] for name, each in modules.items()}
    eager = RankServable(rank.form, passes, saved.vocabularies, version="", cache=KVCache(1 << 30))
    taken: dict[str, list[float]] = {}
    random, differences = np.random.default_rng(0), []
    asked = ((batch, each) for batch in newest_events(saved, data, 1) for each in requests(batch, saved))
    for batch, whole in islice((each for each in asked if len(each[1].events_EC) >= EVENTS), USERS):
        ids_FM = random.integers(1, rank.form.items, (whole.candidates_FM.shape[0], CANDIDATES)).astype(np.int32)
        own = {"events_EC": whole.events_EC[-EVENTS:], "candidates_FM": ids_FM, "known_M": np.ones(CANDIDATES, bool)}
        request = RankRequest(**{**vars(whole), **own})
        variants: dict[str, Callable[[], object]] = {
            "torch the user's newest events": partial(saved.model, batch),
            "compiled the user's newest events": partial(rank.run, [RankRequest(**{**vars(whole), "user": None})]),
        }
        for kind, each in (("compiled", rank), ("torch", eager)):
            variants |= {f"{kind} {name}": run for name, run in parts(each, request)}
            cold = RankRequest(**{**vars(request), "user": None})
            variants |= {f"{kind} cold request": partial(each.run, [cold])}
            variants |= {f"{kind} warm request": partial(each.run, [request])}
        answers = [_outputs(each, request, user=None) for each in (rank, eager)]
        differences.append(float(np.abs(answers[0] - answers[1]).max()))
        for name, spent in seconds(variants, rounds, calls=CALLS).items():
            taken.setdefault(name, []).append(spent)
    print(
        f"\n{len(differences)} users, {EVENTS} events, {CANDIDATES} candidates; scores differ by {max(differences):.1e}"
    )
    print("\n| | torch, ms | compiled, ms | ratio |\n|---|---|---|---|")
    for name in ("prefill", "append", "score", "cold request", "warm request", "the user's newest events"):
        slow, fast = (1e3 * statistics.median(taken[f"{kind} {name}"]) for kind in ("torch", "compiled"))
        print(f"| {name} | {slow:.3f} | {fast:.3f} | {slow / fast:.1f}x |")


def parts(ranks: RankServable, request: RankRequest) -> Iterator[tuple[str, Callable[[], object]]]:
    """The passes with the inputs that a request has: of all events, of the newest alone, of the candidates."""
    positions, buckets = ranks._places(request)
    length, context = torch.tensor([ranks.form.tokens(EVENTS)]), (request.ids_G, request.numbers_K)
    events, newest = (ranks._events(request, first, positions[:-1], buckets[:-1]) for first in (0, EVENTS - 1))
    first = (*events, length, *map(torch.from_numpy, context))
    (kv_NLHW,) = ranks._passes["prefill"](*first)
    ids_FM = torch.from_numpy(request.candidates_FM)
    yield "prefill", partial(ranks._passes["prefill"], *first)
    before = torch.tensor([ranks.form.tokens(EVENTS - 1)])
    yield "append", partial(ranks._passes["append"], kv_NLHW, before, *newest)
    yield "score", partial(ranks._passes["score"], kv_NLHW, length, ids_FM, positions[-1:], buckets[-1:])


@torch.inference_mode()
def agreement(checkpoint: Path, data: Path, users: int | None) -> None:
    saved = gr.load(checkpoint)
    config, model = saved.config, saved.model
    assert isinstance(config, RankingConfig) and isinstance(model, SequenceRanker)
    if config.task.supervision != "candidates":
        raise SystemExit("a model with task.supervision=all predicts each event from those before it, not candidates")
    names = [task.name for task in config.task.tasks]
    ranks = {}
    caches: tuple[CacheDtype, ...] = ("fp32", "bf16")
    for cache in caches:
        dtype = CACHE_DTYPES[cache]
        form = ranking_form(config, saved.schema, microbatch=MICROBATCH, cache=cache)
        form = form.model_copy(update={"tasks": dict.fromkeys(names, False)})  # logits
        passes = ranking_passes(model, partial(FloatTables, model), cache_dtype=dtype)
        run = {name: lambda *inputs, each=each: [each(*inputs)] for name, each in passes.items()}
        vocabularies = {name: Vocabulary(name) for name in saved.vocabularies}
        ranks[dtype] = RankServable(form, run, vocabularies, version="", cache=KVCache(1 << 30))
    print(f"{checkpoint}: cached for {form.lifetime}")
    metrics = {
        name: MultiTaskMetrics(config.task.tasks, ALONE, lambda task: RankingMetrics(task, ALONE, grouped=True))
        for name in ("full", "rank", "rank, bfloat16")
    }
    largest, split, appended, asked = 0.0, 0, 0, 0
    for batch in newest_events(saved, data):
        full_PC, labels_PC, user_P = model(batch), *batch.targets()
        answers: dict[torch.dtype, list[np.ndarray]] = {dtype: [] for dtype in ranks}
        for request in requests(batch, saved):
            if users is not None and asked >= users:
                return _print(metrics, largest, split, appended, asked)
            asked += 1
            exact = ranks[torch.float32]
            for dtype, own in ranks.items():
                answers[dtype].append(_outputs(own, part(request, slice(None)), user=None))
            whole, middle = answers[torch.float32][-1], request.rows // 2
            halves = [part(request, slice(None, middle)), part(request, slice(middle, None))]
            split += np.array_equal(np.concatenate([_outputs(exact, each, user=None) for each in halves]), whole)
            _outputs(exact, half(request), user=request.user)
            appended += np.array_equal(_outputs(exact, request, user=request.user), whole)
        served = {dtype: torch.from_numpy(np.concatenate(each)) for dtype, each in answers.items()}
        largest = max(largest, float((served[torch.float32] - full_PC).abs().max()))
        for name, outputs_PC in (
            ("full", full_PC), ("rank", served[torch.float32]), ("rank, bfloat16", served[torch.bfloat16])
        ):  # fmt: skip
            metrics[name].update(outputs_PC, labels_PC, user_P)
    _print(metrics, largest, split, appended, asked)
    print(f"cache: {dict(ranks[torch.float32].cache.counts) if ranks[torch.float32].cache else 'none'}")


def _outputs(ranks: RankServable, request: RankRequest, user: str | None) -> np.ndarray:
    (answer,) = ranks.run([RankRequest(**{**vars(request), "user": user})])
    return np.stack(list(answer.values()), axis=1)


def _print(metrics: Mapping[str, MultiTaskMetrics], largest: float, split: int, appended: int, asked: int) -> None:
    print(f"{asked} users; largest difference of a logit from the full forward pass: {largest:.2g}")
    print(f"bit-equal in two parts: {split} users; asked with half of the history and then with all: {appended} users")
    for name, each in metrics.items():
        shown = {key: value for key, value in each.compute().items() if key.endswith(("/ne", "/auc"))}
        print(f"{name:<16}", "  ".join(f"{key} {value:.7f}" for key, value in shown.items() if value is not None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--package", type=Path, help="of gr export, of the checkpoint")
    parser.add_argument("--users", type=int, help="the first so many; all unless given")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_machine()
    if arguments.checkpoint is None:
        speed(arguments.lengths, arguments.rounds)
    elif arguments.data is None:
        parser.error("--checkpoint needs --data")
    elif arguments.package is not None:
        compiled(arguments.checkpoint, arguments.data, arguments.package, arguments.rounds)
    else:
        agreement(arguments.checkpoint, arguments.data, arguments.users)


if __name__ == "__main__":
    main()
