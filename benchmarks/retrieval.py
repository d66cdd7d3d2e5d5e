"""A retrieval configuration made ready for its training steps, without a run folder or a trainer."""

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from gr.batch import RetrievalBatch
from gr.config.retrieval import RetrievalConfig
from gr.data.dataset import Dataset
from gr.data.history_batches import HistoryEpochs
from gr.data.loader import ResumableLoader
from gr.dist import World, world
from gr.experiment import Built, build
from gr.recipes.base import open_recipe
from gr.training.module import TrainModule

_open = ExitStack()  # the process group lives as long as the process


@functools.cache
def alone(device: str) -> World:
    """This process as the only rank. device: "cpu" or "cuda"."""
    return _open.enter_context(world("cpu" if device == "cpu" else "cuda"))


def training(config: RetrievalConfig, here: World) -> tuple[Built, TrainModule]:
    """The sharded model, and its steps; examples stay where they are loaded."""
    built = build(open_recipe(config), here)
    return built, TrainModule(built.model, built.recipe.objective(here), config, here)


def first_batches(config: RetrievalConfig, here: World, count: int) -> list[RetrievalBatch]:
    """This rank's, in the training order."""
    epochs = HistoryEpochs(
        Dataset.open(config.data.path),
        config.data,
        seed=config.seed,
        global_batch_size=config.trainer.global_batch_size,
        rank=here.rank,
        world_size=here.size,
    )
    with ResumableLoader(epochs) as loader:
        return [next(loader) for _ in range(count)]


def do_step(module: TrainModule, batch: RetrievalBatch, number: int) -> None:
    module.backward(module.forward(module.prepare(batch, number)), number)


def steps(config: RetrievalConfig, here: World, batches: Sequence[RetrievalBatch]) -> Callable[[], object]:
    """A call is a step of a new model, on the next of `batches`, in turns."""
    _, module = training(config, here)
    numbers = itertools.count()

    def step() -> None:
        number = next(numbers)
        do_step(module, batches[number % len(batches)], number)

    return step
