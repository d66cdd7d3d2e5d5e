"""A retrieval configuration made ready for its training steps, without a run folder or a trainer."""

from gr.batch import RetrievalBatch
from gr.config.retrieval import RetrievalConfig
from gr.data.dataset import Dataset
from gr.data.history_batches import HistoryEpochs
from gr.data.loader import ResumableLoader
from gr.dist import World
from gr.experiment import Built, build
from gr.recipes.base import open_recipe
from gr.training.module import TrainModule


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
