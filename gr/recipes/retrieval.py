"""Retrieval: the next item of a user, from the sequence of those before it (arXiv 2402.17152, section 2.2).

B examples, T tokens, K candidates, C items of the corpus.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gr.batch import EvaluationBatch, RetrievalBatch, move_ids
from gr.config.retrieval import RetrievalConfig
from gr.data.dataset import read_corpus
from gr.data.history_batches import HistoryEpochs, evaluation_batches
from gr.data.loader import ResumableLoader, checksums
from gr.dist import World
from gr.embeddings import with_candidates
from gr.errors import CheckpointError, ConfigError
from gr.logging import get_logger
from gr.metrics.retrieval import retrieval_metrics
from gr.models.retrieval import RetrievalModel
from gr.parallel.dense import unwrapped
from gr.recipes.base import Evaluation, Recommended, ReportTable, Split, Training
from gr.recipes.baselines import evaluate_baselines, no_targets
from gr.recipes.histories import HistoryRecipe
from gr.schema import ITEMS_FILE, SCHEMA_FILE
from gr.tasks import CandidateSampler, CorpusRanker
from gr.training import callbacks
from gr.training.module import Inputs
from gr.training.trainer import Callback

log = get_logger(__name__)
TARGET_FROM_END: dict[Split, Literal[1, 2]] = {"test": 1, "validation": 2}
# What fits a terminal of 80 columns; report.json has all of them.
COLUMNS = ("hr@1", "hr@10", "hr@50", "hr@200", "ndcg@10", "mrr")


class RetrievalObjective:
    """-log p(next item) at every position, against candidates drawn for the step."""

    def __init__(self, sampler: CandidateSampler, world: World) -> None:
        self.sampler, self.world = sampler, world

    def losses(self, batch: RetrievalBatch) -> int:
        return len(batch.target_ids_T)

    def examples(self, batch: RetrievalBatch) -> int:
        return batch.features.stride()

    def inputs(self, batch: RetrievalBatch, step: int, first: int, device: torch.device) -> Inputs:
        candidates = self.sampler.draw(batch, step, self.world, first)
        lookups = move_ids(with_candidates(batch.features, candidates.ids_K), device)
        return Inputs(batch.to(device), lookups, candidates.to(device))

    def total(self, model: nn.Module, inputs: Inputs, looked_up: Any) -> Tensor:
        return model(inputs.batch, inputs.candidates, looked_up)


class RetrievalRecipe(HistoryRecipe[RetrievalConfig]):
    """Trains RetrievalModel; evaluates the place of each user's held-out item among the whole corpus."""

    artifacts = (SCHEMA_FILE, ITEMS_FILE)

    @cached_property
    def corpus(self) -> tuple[np.ndarray, np.ndarray]:
        """Candidate item ids and their counts in training, read once for the sampler and every evaluation."""
        return read_corpus(self.folder, self.schema)

    def check_saved(self, saved: RetrievalConfig, path: str) -> None:
        super().check_saved(saved, path)
        if saved.data.train_holdout != self.config.data.train_holdout:
            raise CheckpointError(
                f"{path} was trained with data.train_holdout={saved.data.train_holdout}, not "
                f"{self.config.data.train_holdout}: other targets are held out. Use another run_dir"
            )

    def objective(self, world: World) -> RetrievalObjective:
        return RetrievalObjective(CandidateSampler(self.config.task, *self.corpus, self.config.seed), world)

    def loader(self, world: World) -> ResumableLoader[RetrievalBatch]:
        """Raises DataError where no user has what the evaluations of a run hold out: they would fail after hours."""
        split: Split = "validation" if self.config.evaluation.every else "test"
        if not self.some_user_has(1 + TARGET_FROM_END[split]):
            raise no_targets(self.evaluation_data.path)
        epochs = HistoryEpochs(
            self.train_data,
            self.config.data,
            seed=self.config.seed,
            global_batch_size=self.config.trainer.global_batch_size,
            rank=world.rank,
            world_size=world.size,
        )
        return ResumableLoader(epochs)

    def callbacks(self, training: Training) -> list[Callback]:
        settings = self.config.evaluation
        if not settings.every:
            return []
        return [
            callbacks.Evaluation(
                lambda: self.evaluate(training.model, training.world, "validation").metrics,
                training.checkpointing,
                training.writer,
                every=settings.every,
                select_by=settings.select_by,
                shown=("hr@10", "ndcg@10", "mrr"),
            )
        ]

    def check_split(self, split: Split) -> None:
        if self.config.evaluates_training_users and self.config.data.train_holdout < TARGET_FROM_END[split]:
            raise ConfigError(
                f"the {split} targets were trained on (data.train_holdout={self.config.data.train_holdout}): evaluate "
                "the test split, or other users with evaluation.path"
            )

    def evaluate(self, model: nn.Module, world: World, split: Split) -> Evaluation:
        """arrays: ranks, the place of each user's item, float64 [users], in the order of the data; 1 is best."""
        settings = self.config.evaluation
        batches = evaluation_batches(
            self.evaluation_data,
            self.config.data,
            target_from_end=TARGET_FROM_END[split],
            global_batch_size=settings.global_batch_size,
            filter_seen=settings.filter_seen,
            rank=world.rank,
            world_size=world.size,
        )
        inner = unwrapped(model)
        assert isinstance(inner, RetrievalModel)
        ranks = corpus_ranks(inner, batches, torch.tensor(self.corpus[0]), world)
        if not len(ranks):
            raise no_targets(self.evaluation_data.path)
        details: dict[str, Any] = {
            "split": split,
            "filter_seen": settings.filter_seen,
            "users": len(ranks),
            "evaluation_data": checksums(self.evaluation_data.row_counts, self.evaluation_data.schema),
            "baselines": {},
        }
        return Evaluation(retrieval_metrics(ranks), details, {"ranks": ranks})

    @torch.no_grad()
    def recommend(self, model: nn.Module, world: World, k: int, holdout: Literal[0, 1]) -> Iterator[Recommended]:
        """Items that evaluation.filter_seen allows, by batches of users. The same at every world size."""
        items, settings = len(self.corpus[0]), self.config.evaluation
        if not 1 <= k <= items:
            raise ConfigError(f"k={k}: the corpus has {items} items; set k to 1 up to that")
        inner = unwrapped(model)
        assert isinstance(inner, RetrievalModel)
        inner.eval()
        ranker = CorpusRanker(torch.tensor(self.corpus[0]), inner.item_vectors, inner.similarity, world)
        batches = evaluation_batches(
            self.evaluation_data,
            self.config.data,
            target_from_end=holdout,
            global_batch_size=settings.global_batch_size,
            filter_seen=settings.filter_seen,
            rank=world.rank,
            world_size=world.size,
            users=True,
        )
        for batch in batches:
            moved = batch.to(world.device)
            queries_BD = inner.similarity.queries(inner.queries(moved)) * inner.similarity.scale
            ids_BK, scores_BK = ranker.top(queries_BD, moved, k)
            there_BK = ((scores_BK > -torch.inf) & moved.valid_B[:, None]).cpu()
            assert batch.user_B is not None, "asked for"
            places_BK = torch.arange(1, k + 1, dtype=torch.int32).expand_as(there_BK)
            users_BK = batch.user_B[:, None].expand_as(there_BK)
            values = (users_BK, ids_BK.cpu(), scores_BK.cpu(), places_BK)
            user_N, item_N, score_N, place_N = (value[there_BK].numpy() for value in values)
            yield Recommended(user_N, item_N, score_N, place_N, users=int(batch.valid_B.sum()))

    def comparisons(self, split: Split) -> dict[str, Any]:
        """Metrics of the configured baselines on the same users; none where the training data is gone."""
        config = self.config
        if not Path(config.data.path).exists():
            log.warning("%s is not there: baselines, which are fitted on it, are left out", config.data.path)
            return {}
        ranks = evaluate_baselines(
            self.train_data,
            self.evaluation_data,
            names=config.evaluation.baselines,
            train_holdout=config.data.train_holdout,
            target_from_end=TARGET_FROM_END[split],
            filter_seen=config.evaluation.filter_seen,
            max_length=config.data.max_length,
            on_bad_row=config.data.on_bad_row,
        )
        return {"baselines": {name: retrieval_metrics(values) for name, values in ranks.items()}}

    @classmethod
    def tables(cls, report: Mapping[str, Any]) -> list[ReportTable]:
        title = f"{report['split']} split, {report['users']:,} users, seen items filtered: {report['filter_seen']}"
        return [ReportTable(title, {"model": report["model"], **report["baselines"]}, COLUMNS)]


@torch.no_grad()
def corpus_ranks(
    model: RetrievalModel, batches: Iterable[EvaluationBatch], corpus_C: Tensor, world: World
) -> np.ndarray:
    """Leave-one-out over the full corpus: the place of each user's target, float64 [users], on every rank. 1 is best.

    All ranks call it together, with as many batches each; the same numbers at every world size.
    """
    was_training = model.training
    model.eval()
    ranker = CorpusRanker(corpus_C, model.item_vectors, model.similarity, world)
    ranks, valid = [], []
    for batch in batches:
        batch = batch.to(world.device)
        ranks.append(ranker.ranks(model.queries(batch), batch))
        valid.append(batch.valid_B)
    model.train(was_training)
    everyone = torch.cat(world.all_gather_variable(torch.cat(ranks)))
    counted = torch.cat(world.all_gather_variable(torch.cat(valid).to(torch.int64))).bool()
    return everyone[counted].cpu().numpy()
