"""What travels between ranks, and what it does to training: index dedup and vectors in fewer bytes, on gloo ranks.

    OMP_NUM_THREADS=1 python -m benchmarks.communication data.path=PATH [--ranks 2] [--steps 200] [KEY=VALUE ...]

A retrieval model is trained from the same weights on the same batches, once for each variant. Losses are of the global
batch, in nats; relative differences are from the first variant, of the same step. Bytes are those of vectors and their
gradients as they are given to all-to-alls, of a step and all ranks; predicted are the planner's, whose ids are drawn by
Zipf's law of the table's skew.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from os import environ
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.machine import describe
from benchmarks.retrieval import first_batches, training
from gr.config import load_config
from gr.config.retrieval import RetrievalConfig
from gr.data.dataset import Dataset
from gr.dist import World, world
from gr.planner.estimate_tables import COMM_BYTES, volume

VARIANTS = {
    "fp32, each id": {"index_dedup": False},
    "fp32": {},
    "bf16": {"forward": "bf16", "backward": "bf16"},
    "fp16 forward, bf16 back": {"forward": "fp16", "backward": "bf16"},
}


class Sent:
    """Bytes of vectors given to all-to-alls; ids, which are integers, are not counted."""

    def __init__(self) -> None:
        self.bytes, self._plain = 0, dist.all_to_all_single
        dist.all_to_all_single = self._counted

    def _counted(self, *given: Any, **named: Any) -> Any:
        sent = [each for each in (*given, *named.values()) if isinstance(each, torch.Tensor)][-1]  # after the output
        if sent.is_floating_point():
            self.bytes += sent.nbytes
        return self._plain(*given, **named)


def variant_of(config: RetrievalConfig, name: str) -> RetrievalConfig:
    chosen = dict(VARIANTS[name])
    dedup = chosen.pop("index_dedup", True)
    tree = config.model_dump(mode="json")
    tree["planner"] |= {"sharding": "row_wise", "index_dedup": dedup, "comm_dtype": chosen}
    return RetrievalConfig.model_validate(tree)


def predicted_bytes(config: RetrievalConfig, ranks: int) -> float:
    """Of a step, there and back, of all ranks."""
    inventory = config.inventory(Dataset.open(config.data.path).schema)
    own, types = volume(inventory, ranks), config.planner.comm_dtype
    each = COMM_BYTES[types.forward] + COMM_BYTES[types.backward]
    return float((own.own_outputs * own.dim).sum() * ranks * each)


def measured(config: RetrievalConfig, here: World, steps: int, sent: Sent) -> dict:
    """Losses of every step, bytes a step of this rank, CPU seconds a step of this rank."""
    _, module = training(config, here)
    losses, before, began = [], sent.bytes, time.process_time()
    for step, batch in enumerate(first_batches(config, here, steps)):
        loss = module.forward(module.prepare(batch, step))
        losses.append(here.all_reduce_sum([float(loss.total)])[0] / loss.tokens)
        module.backward(loss, step)
    return {
        "losses": losses,
        "bytes": (sent.bytes - before) / steps,
        "cpu": (time.process_time() - began) / steps,
        "predicted": predicted_bytes(config, here.size),
    }


def one_rank(steps: int, overrides: Sequence[str]) -> None:
    torch.set_num_threads(1)
    config = load_config("configs/retrieval/ml-1m-hstu.yaml", overrides)
    assert isinstance(config, RetrievalConfig), "a retrieval configuration"
    with world("cpu") as here:
        sent = Sent()
        for name in VARIANTS:
            own = measured(variant_of(config, name), here, steps, sent)
            texts = here.gather_text(json.dumps(own))
            if here.is_main:
                sys.stdout.write(f"VARIANT {json.dumps([name, [json.loads(text) for text in texts]])}\n")
                sys.stdout.flush()


def rows_of(lines: Sequence[str]) -> list[str]:
    rows, base = [], None
    for line in lines:
        name, ranks = json.loads(line.removeprefix("VARIANT "))
        losses = ranks[0]["losses"]
        base = base or losses
        apart = [abs(one / other - 1) for one, other in zip(losses, base, strict=True)]
        sent, cpu = (sum(each[key] for each in ranks) for key in ("bytes", "cpu"))
        rows.append(
            f"| {name} | {losses[0]:.3f} to {losses[-1]:.3f} | {max(apart):.1e} | {sum(apart) / len(apart):.1e} | "
            f"{sent / 1e3:,.1f} | {ranks[0]['predicted'] / 1e3:,.1f} | {1e3 * cpu / len(ranks):.0f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    if "RANK" in environ:
        return one_rank(options.steps, options.overrides)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    command = [*launch, "-m", "benchmarks.communication", f"--steps={options.steps}", *options.overrides]
    done = subprocess.run(command, env={**environ, "GR_MORE_RANKS_THAN_CPUS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{options.ranks} ranks failed:\n{done.stderr[-2000:]}")
    print(f"{describe('cpu')}. {options.ranks} ranks, {options.steps} steps, {' '.join(options.overrides)}\n")
    names = ("vectors", "loss, nats", "largest difference", "mean", "kB a step", "predicted", "CPU ms a rank")
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for row in rows_of([line for line in done.stdout.splitlines() if line.startswith("VARIANT ")]):
        print(row, flush=True)


if __name__ == "__main__":
    main()
