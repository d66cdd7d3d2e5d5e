"""What dealing examples to ranks by FLOPs is worth, on the histories of a configuration.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.balance CONFIG [key=value ...]

First, without training: the work of the busiest rank over the mean, as loaders deal and as gr.parallel.load_balance
does, for batches of the data's lengths. Then training steps of these ranks, each batch both ways in turns: CPU seconds
of the busier rank, which are what the others wait for.
"""

import statistics
import sys
import time

import numpy as np
from torch import distributed

from benchmarks.retrieval import do_step, first_batches, training
from gr.config import load_config
from gr.config.retrieval import RetrievalConfig
from gr.data.dataset import Dataset
from gr.dist import World, use_cpu_well, world
from gr.parallel.load_balance import LoadBalancer, deal
from gr.training.module import TrainModule

RANKS, EXAMPLES, DRAWS = (2, 8, 64, 512), (4, 16, 64), 100
STEPS, WARMUPS = 24, 2


def main() -> None:
    config = load_config(sys.argv[1], sys.argv[2:])
    assert isinstance(config, RetrievalConfig), "a retrieval configuration"
    with world("cpu") as here:
        use_cpu_well(here)
        built, module = training(config, here)
        flops = built.recipe.example_flops()
        assert flops is not None, "data.balance is set"
        balance = LoadBalancer(flops, here)
        if here.is_main:
            simulate(training_lengths(built.recipe.train_data, config), balance)
        measure(module, balance, config, here)


def training_lengths(data: Dataset, config: RetrievalConfig) -> np.ndarray:
    groups = (data.read_row_group(group, ["item_ids"]).lengths_B for group in range(len(data.row_groups)))
    return np.clip(np.concatenate(list(groups)) - config.data.train_holdout - 1, 0, config.data.max_length)


def simulate(lengths_N: np.ndarray, balance: LoadBalancer) -> None:
    random = np.random.default_rng(1)
    quantiles = ", ".join(f"{np.quantile(lengths_N, q):.0f}" for q in (0.1, 0.5, 0.9, 1.0))
    print(f"{len(lengths_N)} histories; lengths at 10, 50, 90, 100 %: {quantiles}")
    print(
        "| ranks | examples a rank | busiest rank / mean: as loaded | dealt | longest example alone |\n"
        + "|---" * 5
        + "|"
    )
    for ranks in RANKS:
        for examples in EXAMPLES:
            found = []
            for _ in range(DRAWS):
                cost_N = balance.flops(random.choice(lengths_N, ranks * examples))
                owner_N = deal(cost_N, ranks)
                dealt = np.bincount(owner_N, cost_N, ranks)
                loaded = cost_N.reshape(ranks, examples).sum(axis=1)
                found.append([load.max() / loaded.mean() for load in (loaded, dealt, cost_N)])
            print(f"| {ranks} | {examples} | " + " | ".join(f"{ratio:.2f}" for ratio in np.mean(found, axis=0)) + " |")


def measure(module: TrainModule, balance: LoadBalancer, config: RetrievalConfig, here: World) -> None:
    batches = first_batches(config, here, STEPS)
    cpu: dict[bool, list[float]] = {False: [], True: []}
    wall: dict[bool, list[float]] = {False: [], True: []}
    for number, batch in enumerate(batches[:WARMUPS] + batches):
        for balanced in (False, True) if number % 2 else (True, False):
            module.balance = balance if balanced else None
            distributed.barrier()
            began, used = time.perf_counter(), time.process_time()
            do_step(module, batch, number)
            mine = [time.process_time() - used, time.perf_counter() - began]
            if number >= WARMUPS:
                everyone = np.array(here.all_gather_ints([round(seconds * 1e6) for seconds in mine])) / 1e6
                cpu[balanced].append(everyone[:, 0].max())
                wall[balanced].append(everyone[:, 1].max())
    if here.is_main:
        print(f"\n{here.size} ranks, global batch {config.trainer.global_batch_size}, {STEPS} steps each way")
        for name, seconds in (("CPU seconds of the busier rank", cpu), ("wall seconds", wall)):
            ratios = [a / b for a, b in zip(seconds[False], seconds[True], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            means = [statistics.fmean(seconds[balanced]) for balanced in (False, True)]
            print(
                f"{name} a step: as loaded {means[0]:.3f}, dealt {means[1]:.3f}, {means[0] / means[1]:.2f} times; "
                f"by batch, median {middle:.2f}, quartiles {low:.2f} to {high:.2f}"
            )


if __name__ == "__main__":
    main()
