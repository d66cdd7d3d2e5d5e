"""Training steps on one thread with glibc as it is, and told to keep what is freed (gr.dist.use_cpu_well).

    python -m benchmarks.freed_memory CONFIG [key=value ...]

A new process each time, in turns; medians of its steps, and its peak memory.
"""

import resource
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.retrieval import do_step, first_batches, training
from gr.config import load_config
from gr.config.retrieval import RetrievalConfig
from gr.dist import use_cpu_well, world

ROUNDS, STEPS, WARMUPS, BATCHES = 4, 24, 4, 8
WAYS = ("as it is", "kept")


def main() -> None:
    if sys.argv[1] in WAYS:
        seconds, peak = steps(sys.argv[1], sys.argv[2:])
        print(f"{seconds:.4f} {peak:.0f}")
        return
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(ROUNDS):
        for way in WAYS if number % 2 else reversed(WAYS):
            command = [sys.executable, "-m", "benchmarks.freed_memory", way, *sys.argv[1:]]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, peak = map(float, done.stdout.split()[-2:])
            found[way].append(seconds)
            print(f"{way:9s} {seconds:.3f} CPU s a step, peak {peak:.0f} MiB", flush=True)
    ratios = [a / b for a, b in zip(*found.values(), strict=True)]
    print(f"as it is / kept: {', '.join(f'{r:.2f}' for r in ratios)}; median {statistics.median(ratios):.2f}")


def steps(way: str, arguments: list[str]) -> tuple[float, float]:
    """CPU seconds of the median step, and MiB."""
    config = load_config(arguments[0], arguments[1:])
    assert isinstance(config, RetrievalConfig), "a retrieval configuration"
    with world("cpu") as here:
        if way == "kept":
            use_cpu_well(here)
        torch.set_num_threads(1)
        _, module = training(config, here)
        batches = first_batches(config, here, BATCHES)
        seconds = []
        for number in range(STEPS):
            used = time.process_time()
            do_step(module, batches[number % BATCHES], number)
            seconds.append(time.process_time() - used)
    return statistics.median(seconds[WARMUPS:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
