"""A retrieval configuration made ready for its training steps, without a run folder or a trainer."""

from gr.batch import SequenceBatch
from gr.config.tree import ExperimentConfig
from gr.data.dataset import Dataset
from gr.data.loader import TrainLoader
from gr.dist import World
from gr.experiment.retrieval import Built, build
from gr.tasks import CandidateSampler
from gr.train.module import TrainModule
from gr.train.objectives import RetrievalObjective


def training(config: ExperimentConfig, here: World) -> tuple[Built, TrainModule]:
    """The sharded model, and its steps; examples stay where they are loaded."""
    built = build(config, here)
    objective = RetrievalObjective(CandidateSampler(config.task, *built.corpus, config.seed), here)
    return built, TrainModule(built.model, objective, config, here)


def first_batches(config: ExperimentConfig, here: World, count: int) -> list[SequenceBatch]:
    """This rank's, in the training order."""
    with TrainLoader(
        Dataset.open(config.data.path),
        config.data,
        seed=config.seed,
        global_batch_size=config.trainer.global_batch_size,
        rank=here.rank,
        world_size=here.size,
    ) as loader:
        return [next(loader) for _ in range(count)]


def do_step(module: TrainModule, batch: SequenceBatch, number: int) -> None:
    module.backward(module.forward(module.prepare(batch, number)), number)
