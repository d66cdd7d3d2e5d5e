"""Memory that the planner predicts beside the memory that training takes, on every rank.

    python -m benchmarks.predicted [CONFIG] [KEY=VALUE ...] [--ranks 4]          # ranks of this machine
    torchrun --nproc-per-node 8 -m benchmarks.predicted CONFIG [KEY=VALUE ...]   # on several hosts, as it is launched

Without CONFIG: configs/retrieval/smoke.yaml on generated data, the planner free to choose. Predictions are for the mean
length of the batch that is measured. Kept for backward: unique storages that autograd saves in one step, parameters
apart, beside the planner's activations and logits (its logits hold their gradient too, and the vectors that tables
return are its embeddings). Peak: torch.cuda.max_memory_allocated; on CPU the parameters and states above and what three
steps add to the resident set, where the allocator's own choices are some MiB of noise.
"""

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from os import environ
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.compare import print_machine
from benchmarks.retrieval import do_step
from gr import dist
from gr.batch import RetrievalBatch
from gr.config import load_config
from gr.config.inventory import InventoryConfig, TowerDense
from gr.config.retrieval import RetrievalConfig
from gr.dist import World
from gr.experiment import Built, build
from gr.planner.estimate import MEMORY, estimate
from gr.prepare.synthetic import StreamOptions, write_stream
from gr.recipes.base import open_recipe
from gr.training.module import TrainModule

SMOKE = "configs/retrieval/smoke.yaml"
SMOKE_DATA = StreamOptions(items=2000, categories=20, records=2000, length=64)
# The measurements, and the planner's kinds of memory that each takes together.
COMPARED = {
    "tables": ("tables",),
    "table optimizer": ("table_optimizer",),
    "dense parameters": ("dense_parameters",),
    "dense optimizer": ("dense_optimizer",),
    "kept for backward": ("activations", "logits"),
    "peak": tuple(kind for kind in MEMORY if kind != "reserve"),
}
WARMUPS, STEPS = 2, 3


def main(arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    if "RANK" not in environ:
        _launch(list(arguments))
        return
    torch.set_num_threads(1)
    config = load_config(arguments[0], arguments[1:])
    if not isinstance(config, RetrievalConfig):
        raise SystemExit(f"{arguments[0]}: task.kind={config.kind}; this measures retrieval")
    with dist.world(config.device) as world:
        predicted, measured = _compare(config, world)
        of_all = [world.all_gather_ints([round(v[name]) for name in COMPARED]) for v in (predicted, measured)]
        if world.is_main:
            print_machine()
            _print(config, world, *of_all)


def _launch(arguments: list[str]) -> None:
    """Starts the ranks with torchrun."""
    ranks = "2"
    if "--ranks" in arguments:
        at = arguments.index("--ranks")
        ranks = arguments[at + 1]
        del arguments[at : at + 2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with tempfile.TemporaryDirectory(prefix="gr-predicted-") as folder:
        if not arguments or "=" in arguments[0]:
            write_stream(SMOKE_DATA, Path(folder))
            paths = [f"data.path={folder}/train", f"evaluation.path={folder}/test"]
            arguments = [SMOKE, *paths, "planner.sharding=auto", *arguments]
        subprocess.run([*torchrun, "-m", "benchmarks.predicted", *arguments], check=True)


def _compare(config: RetrievalConfig, world: World) -> tuple[dict[str, float], dict[str, float]]:
    """(predicted, measured) bytes of this rank by the names in COMPARED."""
    built = build(open_recipe(config), world)
    module = TrainModule(built.model, built.recipe.objective(world), config, world)
    with closing(built.recipe.loader(world)) as loader:
        batch = next(loader)
    for step in range(WARMUPS):
        do_step(module, batch, step)
    optimizer = module.table_optimizer
    dense_states = [t for state in module.dense_optimizer.state.values() for t in state.values() if t.dim()]
    held = {
        "tables": sum(shard.weight.nbytes for shard in optimizer.shards),
        "table optimizer": sum(t.nbytes for states in optimizer.states for t in states.values()),
        "dense parameters": sum(p.nbytes for p in module.dense.values()),
        "dense optimizer": sum(t.nbytes for t in dense_states),
    }
    kept = _kept_for_backward(module, batch)
    measured = {**held, "kept for backward": kept, "peak": _peak(module, batch, world, sum(held.values()))}
    return _predicted(built, batch, world), {name: float(measured[name]) for name in COMPARED}


def _predicted(built: Built, batch: RetrievalBatch, world: World) -> dict[str, float]:
    config, plan = built.recipe.config, built.plan
    assert isinstance(config, RetrievalConfig) and plan is not None, "main() checks the kind, and it has a table"
    tokens, examples = len(batch.target_ids_T), batch.features.stride()
    inventory = at_mean_length(config.inventory(built.recipe.schema), max(1.0, tokens / examples))
    memory_MR = estimate(replace(plan, inventory=inventory)).memory_MR
    of_kind = {kind: float(memory_MR[row, world.rank % memory_MR.shape[1]]) for row, kind in enumerate(MEMORY)}
    return {name: sum(of_kind[kind] for kind in kinds) for name, kinds in COMPARED.items()}


def at_mean_length(inventory: InventoryConfig, mean_length: float) -> InventoryConfig:
    """`inventory`, which counts every example as the longest there can be, for examples of `mean_length` tokens."""
    dense = inventory.dense
    assert isinstance(dense, TowerDense)
    share = mean_length / dense.mean_length
    tables = [t.model_copy(update={"ids_per_example": t.ids_per_example * share}) for t in inventory.tables]
    scores = inventory.loss.scores_per_example * share
    return inventory.model_copy(
        update={
            "tables": tuple(tables),
            "dense": dense.model_copy(update={"mean_length": mean_length}),
            "loss": inventory.loss.model_copy(update={"scores_per_example": scores}),
        }
    )


def _kept_for_backward(module: TrainModule, batch: RetrievalBatch) -> int:
    """Bytes of the storages that a forward pass saves, without parameters, tables and the batch itself."""
    owned = [*module.dense.values(), *(shard.weight for shard in module.table_optimizer.shards)]
    apart = {t.untyped_storage().data_ptr() for t in [*owned, batch.features.values(), batch.target_ids_T]}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = module.forward(module.prepare(batch, WARMUPS))
    module.backward(loss, WARMUPS)
    return sum(saved.values())


def _peak(module: TrainModule, batch: RetrievalBatch, world: World, held: int) -> int:
    """The most bytes in use during STEPS steps. held: bytes of parameters, tables and states."""
    on_cuda = world.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(world.device)
    else:
        # Gives free pages back, and starts the high-water mark anew (proc(5), clear_refs).
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    between = _resident("VmRSS")
    for step in range(STEPS):
        do_step(module, batch, WARMUPS + 1 + step)
    if on_cuda:
        return torch.cuda.max_memory_allocated(world.device)
    return held + _resident("VmHWM") - between


def _resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{field}:")))


def _print(
    config: RetrievalConfig, world: World, predicted: Sequence[Sequence[int]], measured: Sequence[Sequence[int]]
) -> None:
    print(
        f"\n{config.run_dir}: {world.size} ranks on {world.device.type}, batch {config.trainer.global_batch_size}, kB"
    )
    print(f"{'rank':>4s}  {'':20s} {'predicted':>12s} {'measured':>12s} {'error':>8s}")
    for rank, (ours, theirs) in enumerate(zip(predicted, measured, strict=True)):
        for name, a, b in zip(COMPARED, ours, theirs, strict=True):
            error = f"{a / b - 1:+8.1%}" if b else f"{'exact' if a == b else 'inf':>8s}"
            print(f"{rank:4d}  {name:20s} {a / 1e3:12.1f} {b / 1e3:12.1f} {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
