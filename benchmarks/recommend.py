"""`gr recommend` beside plain torch: `python -m benchmarks.recommend [--users N] [--items N]`.

A log with text ids is made and prepared, and a model trained for one step; then, in turns and on one thread, gr writes
the 100 best items of every user, and so does the plain way: the same batches and query vectors, one matrix product with
the whole corpus, seen items set to minus infinity, torch.topk, ids through an array of texts, one Parquet file. Both
files are compared. Medians of users a CPU second.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import gr
from benchmarks.compare import print_machine
from gr.dist import world
from gr.experiment import trained
from gr.models.saved import ALONE
from gr.recipes.answers import write_answers
from gr.recipes.base import Request

K = 100


def make_log(users: int, items: int) -> pa.Table:
    stream = np.random.default_rng(0)
    size = 20 * users
    user_T = np.char.add("user-", stream.integers(0, users, size).astype("U9"))
    item_T = np.char.add("item-", (items * stream.random(size) ** 2).astype(np.int64).astype("U9"))
    return pa.table({"u": user_T, "i": item_T, "t": stream.integers(1_600_000_000, 1_700_000_000, size)})


def plain(recipe, model, out: Path) -> None:
    corpus_C, _ = recipe.corpus
    items, users = recipe.vocabulary("item_id"), recipe.user_vocabulary()
    names_C = np.array(items.values(corpus_C).to_pylist(), dtype=object)
    names_U = users.values_V.to_numpy(zero_copy_only=False)
    vectors_CD = model.similarity.items(model.item_vectors(torch.tensor(corpus_C)))
    place = torch.zeros(int(corpus_C.max()) + 1, dtype=torch.int64)
    place[torch.tensor(corpus_C)] = torch.arange(len(corpus_C))
    columns: list[list[np.ndarray]] = [[], [], []]
    for batch in recipe.user_batches(ALONE, target_from_end=0):
        score_BC = model.user_vectors(batch) @ vectors_CD.T
        owner = torch.arange(len(score_BC)).repeat_interleave(batch.seen_offsets.diff())
        score_BC[owner, place[batch.seen_ids]] = -torch.inf
        best = score_BC.topk(K, dim=1)
        valid = batch.valid_B
        rows = names_U[np.searchsorted(users.ids_V, batch.user_B[valid].numpy())]
        columns[0].append(np.repeat(rows, K))
        columns[1].append(names_C[best.indices[valid].numpy().reshape(-1)])
        columns[2].append(best.values[valid].numpy().reshape(-1))
    user, item, score = map(np.concatenate, columns)
    pq.write_table(pa.table({"user_id": user, "item_id": item, "score": score}), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print_machine()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = make_log(options.users, options.items)
        gr.prepare_events(log, folder / "data", user="u", item="i", time="t", time_unit="s")
        config = gr.load_config(
            "retrieval/hstu",
            [
                f"data.path={folder / 'data'}",
                f"run_dir={folder / 'run'}",
                *("trainer.steps=1", "evaluation.every=null", "evaluation.baselines=[]"),
            ],
        )
        gr.train(config)
        _measure(folder, options.rounds)


def _measure(folder: Path, rounds: int) -> None:
    saved = gr.load(folder / "run")
    with world("cpu") as own, trained(saved.config, saved.folder, own) as built:
        torch.set_num_threads(1)
        recipe = built.recipe

        def ours() -> None:
            answers = recipe.recommend(built.model, own, Request(K))
            write_answers(folder / "ours.parquet", answers.schema, answers.tables, own)

        def theirs() -> None:
            with torch.no_grad():
                plain(recipe, saved.model, folder / "plain.parquet")

        variants: dict[str, Callable[[], None]] = {"gr recommend": ours, "plain torch": theirs}
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(rounds):
            for variant, run in variants.items():
                began = time.process_time()
                run()
                seconds[variant].append(time.process_time() - began)
    _compare(folder)
    users = recipe.evaluation_data.rows
    for variant, measured in seconds.items():
        print(f"{variant:14s} {users / statistics.median(measured):10,.0f} users a CPU second")
    ratio = statistics.median(t / o for o, t in zip(seconds["gr recommend"], seconds["plain torch"], strict=True))
    print(f"ratio {ratio:.2f}: {users:,} users, {len(recipe.corpus[0]):,} items, the {K} best")


def _compare(folder: Path) -> None:
    ours, plain_rows = (pq.read_table(folder / f"{name}.parquet") for name in ("ours", "plain"))
    if not ours.column("user_id").cast(pa.string()).equals(plain_rows.column("user_id").cast(pa.string())):
        raise RuntimeError("the two have other users")
    score = np.abs(ours.column("score").to_numpy() - plain_rows.column("score").to_numpy()).max()
    if score > 1e-4:
        raise RuntimeError(f"the two differ by {score} in a score")
    print("the same users and scores from both")


if __name__ == "__main__":
    main()
