"""One training step of this tree against that of an older checkout, in turns, with losses beside each other.

    python -m benchmarks.older CHECKOUT --data FOLDER [--config FILE] [--isa avx2] [--rounds 15]

A process of each tree holds its own model of the same configuration (that of benchmarks/train_step.py by default) and
takes the same batches; the parent hands the turn to one and then to the other. CPU seconds of one thread, medians.
--isa avx2 builds the C++ operators without AVX-512, and forbids it to torch, MKL and oneDNN.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BATCHES = 8
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def worker(config_path: str, data: str, isa: str) -> None:
    """Of the tree in the working folder: a step for each line on stdin, its CPU seconds and loss on stdout."""
    sys.path[0] = os.getcwd()
    import torch

    torch.set_num_threads(1)
    from benchmarks.retrieval import first_batches, training
    from gr.config import load_config
    from gr.dist import world
    from gr.ops import cpp_extension

    if isa == "avx2":
        flags = ("-march=x86-64-v3", "-mprefer-vector-width=256")
        wide = ("-march=native", "-mprefer-vector-width=512")
        cpp_extension._COMPILE_FLAGS = (*(f for f in cpp_extension._COMPILE_FLAGS if f not in wide), *flags)
    config: Any = load_config(config_path, [f"data.path={data}", "device=cpu"])
    with world("cpu") as here:
        _, module = training(config, here)
        batches = first_batches(config, here, BATCHES)
        for number, _ in enumerate(sys.stdin):
            started = time.process_time()
            objective = module.forward(module.prepare(batches[number % BATCHES], number))
            module.backward(objective, number)
            seconds = time.process_time() - started
            print(json.dumps([seconds, float(objective.loss.detach())]), flush=True)


@contextmanager
def running(tree: Path, arguments: argparse.Namespace) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(arguments.data.resolve())]
    command += [arguments.config, arguments.isa]
    environment = os.environ | (AVX2 if arguments.isa == "avx2" else {})
    with subprocess.Popen(
        command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def step(process: subprocess.Popen[str]) -> tuple[float, float]:
    """CPU seconds, and the loss."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    seconds, loss = json.loads(process.stdout.readline())
    return seconds, loss


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.older", description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--config", default="configs/retrieval/ml-1m-hstu.yaml")
    parser.add_argument("--isa", choices=["native", "avx2"], default="native")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    trees = {"older": arguments.checkout, "this": Path.cwd()}
    with running(trees["older"], arguments) as older, running(trees["this"], arguments) as this:
        steps: dict[str, list[tuple[float, float]]] = {"older": [], "this": []}
        for _ in range(BATCHES + arguments.rounds):
            steps["older"].append(step(older))
            steps["this"].append(step(this))
    medians = {}
    for name, taken in steps.items():
        low, medians[name], high = statistics.quantiles([seconds for seconds, _ in taken[BATCHES:]], n=4)
        print(f"{name:6s} {medians[name] * 1e3:8.1f} ms [{low * 1e3:.1f}, {high * 1e3:.1f}], loss {taken[-1][1]:.6f}")
    apart = max(abs(a - b) / abs(a) for (_, a), (_, b) in zip(steps["older"], steps["this"], strict=True))
    print(f"this tree is {medians['older'] / medians['this']:.2f} times as fast; losses differ by up to {apart:.1e}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[3], sys.argv[2], sys.argv[4])
    else:
        main()
