"""The engine alone, with a model that costs a known time: swaps under load, and load that is three times too much.

    python -m benchmarks.serving_engine swap --answers 100000
    python -m benchmarks.serving_engine overload --seconds 5

The model is that of the tests: each answer says from two tensors, read at different times, which version it is of.
"""

import argparse
import threading
import time

import numpy as np

from gr.config.serving import EngineConfig
from gr.serving import Engine
from gr.serving.load.load_test import overload, poisson
from gr.serving.load.targets import EngineTarget
from tests.support.toy_serving import ToyVersion


def swap_under_load(answers: int, interval: float, threads: int = 3) -> None:
    """Asks from several threads while versions are swapped every `interval` seconds."""
    mixed, closed_late, done = 0, 0, 0
    lock, stop = threading.Lock(), threading.Event()

    def ask() -> None:
        nonlocal mixed, done
        while not stop.is_set():
            futures = [engine.submit("score", {"x": np.ones(1, np.float32)}) for _ in range(32)]
            wrong = 0
            for future in futures:
                answer = future.result()
                named = {float(answer.outputs[name][0]) for name in ("before", "after")}
                named.add(float(answer.outputs["y"][0]) / 2)
                wrong += {f"step-{number:.0f}" for number in named} != {answer.version}
            with lock:
                mixed, done = mixed + wrong, done + len(futures)

    versions, pauses = [ToyVersion(1)], []
    with Engine(versions[0], EngineConfig(deadline_ms=60_000)) as engine:
        workers = [threading.Thread(target=ask) for _ in range(threads)]
        for worker in workers:
            worker.start()
        while done < answers:
            versions.append(ToyVersion(len(versions) + 1))
            pauses.append(engine.swap(versions[-1]))
            time.sleep(interval)
        stop.set()
        for worker in workers:
            worker.join()
    closed_late = sum(not version.closed.is_set() for version in versions)
    microseconds = 1e6 * np.array(pauses)
    print(f"{done:,} answers over {len(pauses):,} swaps: {mixed} mixed, {closed_late} versions left open")
    print(f"pause: median {np.median(microseconds):.1f} us, worst {microseconds.max():.1f} us")


def too_much(fixed: float, row: float, rows: int, deadline: float, seconds: float) -> None:
    """Goodput at rising rates, and at three times the rate of the best.

    A batch of n rows takes `fixed + row * n` seconds of one thread, without using the processor.
    """
    request = {"x": np.ones(rows, np.float32)}
    config = EngineConfig(deadline_ms=1e3 * deadline, batch_rows=64 * rows)
    with Engine(ToyVersion(1, fixed=fixed, row=row), config) as engine:
        target = EngineTarget(engine, "score", [request])
        # Two batches in a deadline, one that waits and one that runs.
        nominal = (deadline / 2 - fixed) / (row * rows) / (deadline / 2)
        runs = []
        for share in (0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5):
            runs.append(target.run(poisson(share * nominal, seconds, np.random.default_rng(0))))
            print("  ", runs[-1].describe(deadline))
        best = max(runs, key=lambda run: run.goodput(deadline))
        over = overload(target, best.offered, seconds)
        print("3 times:", over.describe(deadline))
        print(f"goodput kept: {over.goodput(deadline) / best.goodput(deadline):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["swap", "overload"])
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--interval", type=float, default=0.002, help="seconds between swaps")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run of the overload")
    parser.add_argument("--scale", type=float, default=1.0, help="of all times of the overload; 10 on a busy machine")
    given = parser.parse_args()
    if given.what == "swap":
        swap_under_load(given.answers, given.interval)
    else:
        too_much(0.01 * given.scale, 0.0002 * given.scale, 8, 0.06 * given.scale, given.seconds * given.scale)


if __name__ == "__main__":
    main()
