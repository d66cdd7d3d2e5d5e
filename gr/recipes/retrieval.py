"""Retrieval: the next item of a user, from the sequence of those before it (arXiv 2402.17152, section 2.2).

B examples, T tokens, K candidates, C items of the corpus.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from gr.batch import ITEM_FEATURE, EvaluationBatch, RetrievalBatch, move_ids
from gr.config.histories import HistoryDataConfig
from gr.config.retrieval import FullSoftmax, RetrievalConfig
from gr.data.collate import Counts, collate_train
from gr.data.dataset import read_corpus, read_item_features
from gr.data.history_batches import HistoryEpochs, UserBatches, evaluation_batches
from gr.data.loader import ResumableLoader, checksums
from gr.data.stochastic_length import Draws
from gr.data.vocabulary import Vocabulary
from gr.dist import World
from gr.embeddings import with_candidates
from gr.errors import CheckpointError, ConfigError
from gr.logging import get_logger
from gr.metrics.retrieval import retrieval_metrics
from gr.models.retrieval import RetrievalModel, Weights
from gr.parallel.dense import unwrapped
from gr.recipes.answers import read_listed
from gr.recipes.base import Answers, Evaluation, ReportTable, Request, Split, Training
from gr.recipes.baselines import Targets, evaluate_baselines, no_targets
from gr.recipes.histories import HistoryRecipe
from gr.recipes.recommendations import Recommendations
from gr.schema import ITEMS_FILE, LARGEST_DENSE, USER_COLUMN
from gr.tasks import CandidateSampler, CorpusRanker, require_product
from gr.training import callbacks
from gr.training.module import Inputs
from gr.training.trainer import Callback

log = get_logger(__name__)
TARGET_FROM_END: dict[Split, Literal[1, 2]] = {"test": 1, "validation": 2}
VECTORS = 1 << 14  # of a table of vectors
JUDGED = ("hr@10", "ndcg@10")  # those in which a model is to be above the baselines
# What fits a terminal of 80 columns; report.json has all of them.
COLUMNS = ("hr@1", "hr@10", "hr@50", "hr@200", "ndcg@10", "mrr")


class RetrievalObjective:
    """-log p(next item) at every position, against candidates drawn for the step."""

    def __init__(
        self,
        sampler: CandidateSampler,
        world: World,
        item_features: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.sampler, self.world, self.item_features = sampler, world, item_features

    def losses(self, batch: RetrievalBatch) -> int:
        return len(batch.target_ids_T)

    def examples(self, batch: RetrievalBatch) -> int:
        return batch.features.stride()

    def inputs(self, batch: RetrievalBatch, step: int, first: int, device: torch.device) -> Inputs:
        candidates = self.sampler.draw(batch, step, self.world, first)
        lookups = move_ids(with_candidates(batch.features, candidates.ids_K, self.item_features), device)
        return Inputs(batch.to(device), lookups, candidates.to(device))

    def total(self, model: nn.Module, inputs: Inputs, looked_up: Any) -> Tensor:
        return model(inputs.batch, inputs.candidates, looked_up)


class RetrievalRecipe(HistoryRecipe[RetrievalConfig]):
    """Trains RetrievalModel; evaluates the place of each user's held-out item among the whole corpus."""

    corpus_files = (ITEMS_FILE,)

    @cached_property
    def corpus(self) -> tuple[np.ndarray, np.ndarray]:
        """Candidate item ids and their counts in training, read once for the sampler and every evaluation."""
        return read_corpus(self.folder, self.schema)

    @cached_property
    def item_features(self) -> dict[str, Tensor]:
        """The ids of each feature of items, by item."""
        return {name: torch.from_numpy(ids_E) for name, ids_E in read_item_features(self.folder, self.schema).items()}

    def model(self) -> nn.Module:
        model = super().model()
        assert isinstance(model, RetrievalModel)
        model.item_features = self.item_features
        return model

    def check_saved(self, saved: RetrievalConfig, path: str) -> None:
        super().check_saved(saved, path)
        if saved.data.train_holdout != self.config.data.train_holdout:
            raise CheckpointError(
                f"{path} was trained with data.train_holdout={saved.data.train_holdout}, not "
                f"{self.config.data.train_holdout}: other targets are held out. Use another run_dir"
            )

    def objective(self, world: World) -> RetrievalObjective:
        sampler = CandidateSampler(self.config.task, *self.corpus, self.config.seed)
        return RetrievalObjective(sampler, world, self.item_features)

    def loader(self, world: World) -> ResumableLoader[RetrievalBatch]:
        self.check_targets()
        epochs = HistoryEpochs(
            self.train_data,
            self.config.data,
            seed=self.config.seed,
            global_batch_size=self.config.trainer.global_batch_size,
            rank=world.rank,
            world_size=world.size,
        )
        return ResumableLoader(epochs)

    def check_targets(self) -> None:
        """Raises DataError where no user has what the evaluations of a run hold out: they would fail after hours."""
        split: Split = "validation" if self.config.evaluation.every else "test"
        if not self.some_user_has(1 + TARGET_FROM_END[split]):
            raise no_targets(self.evaluation_data.path)

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
                over=f"{self.evaluation_data.rows:,} users",
                patience=settings.patience,
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
        batches = self.user_batches(world, target_from_end=TARGET_FROM_END[split])
        ranks = corpus_ranks(_plain(model), batches, torch.tensor(self.corpus[0]), world)
        if not len(ranks):
            raise no_targets(self.evaluation_data.path)
        details: dict[str, Any] = {
            "split": split,
            "filter_seen": self.config.evaluation.filter_seen,
            "users": len(ranks),
            "evaluation_data": checksums(self.evaluation_data.row_counts, self.evaluation_data.schema),
            "baselines": {},
        }
        metrics = retrieval_metrics(ranks)
        if self.config.evaluation.loss:
            metrics["loss"] = self._mean_loss(model, world)
        return Evaluation(metrics, details, {"ranks": ranks})

    @torch.no_grad()
    def _mean_loss(self, model: nn.Module, world: World) -> float:
        """The loss of evaluation.loss, in nats; NaN where no user has two events. Collective."""
        whole = HistoryDataConfig(
            path=self.config.data.path, max_length=self.config.data.max_length, train_holdout=0
        )  # every event but the first is a target
        batches = UserBatches(
            self.evaluation_data,
            whole,
            lambda rows: (collate_train(rows, Draws(0, np.arange(len(rows.row_B))), 0, whole)[0], Counts()),
            global_batch_size=self.config.evaluation.global_batch_size,
            rank=world.rank,
            world_size=world.size,
        )
        task = self.config.task.model_copy(update={"negatives": FullSoftmax()})
        objective = RetrievalObjective(CandidateSampler(task, *self.corpus, 0), world, self.item_features)
        was_training, total, events = model.training, 0.0, 0
        model.eval()
        for batch in batches:
            inputs = objective.inputs(batch, 0, 0, world.device)
            looked_up = _plain(model).tables(inputs.lookups)
            total += float(objective.total(model, inputs, looked_up))
            events += objective.losses(batch)
        model.train(was_training)
        total, count = world.all_reduce_sum([total, float(events)])
        return total / count if count else math.nan

    def recommend(self, model: nn.Module, world: World, request: Request) -> Answers:
        """Items that evaluation.filter_seen allows, by batches of users. The same at every world size.

        Columns: user_id and item_id (as in the log), score, place (1 is best).
        """
        items, users = self.vocabulary(ITEM_FEATURE), self.user_vocabulary()
        corpus_C, counts_C, unknown = self._allowed(request.items, items)
        if not len(corpus_C):
            raise ConfigError(f"{request.items}: names no item of the data, so nothing can be recommended; look at it")
        listed = None if request.users is None else read_listed(request.users, users)
        k = request.k
        if listed is not None and listed.limits_N is not None:
            k = int(listed.limits_N.max(initial=1))
        if not 1 <= k <= len(corpus_C):
            raise ConfigError(f"k={k}: {len(corpus_C)} items may be recommended; set k to 1 up to that")
        inner = _plain(model)
        with torch.no_grad():
            ranker = CorpusRanker(torch.tensor(corpus_C), inner.item_vectors, inner.similarity, world)
        rows_N = None if listed is None else self.evaluation_data.rows_of(listed.ids_N)
        batches = self.user_batches(world, target_from_end=request.holdout, rows_N=rows_N)
        popular_K = corpus_C[np.argsort(-counts_C, kind="stable")[:k]] if request.cold == "popularity" else None
        chosen = Recommendations(inner, ranker, batches, users, items, k, listed, popular_K)
        answers = Answers(chosen.schema, (), {"unknown_items": unknown})
        answers.tables = chosen.tables(world, answers.counts)
        return answers

    def embed(self, model: nn.Module, world: World) -> dict[str, Answers]:
        """items: of the corpus; users: of the evaluation data, after their newest event. Both have `vector`, and the
        dot product of a user's and an item's is the score of `recommend`.
        """
        require_product(_plain(model).similarity, "`gr embed`")
        users, items = self.user_vocabulary(), self.vocabulary(ITEM_FEATURE)
        vector = ("vector", pa.list_(pa.float32()))
        return {
            "items": Answers(pa.schema([("item_id", items.type), vector]), self._item_vectors(model, world, items)),
            "users": Answers(pa.schema([(USER_COLUMN, users.type), vector]), self._user_vectors(model, world, users)),
        }

    @torch.no_grad()
    def _item_vectors(self, model: nn.Module, world: World, items: Vocabulary) -> Iterator[pa.Table]:
        inner = _plain(model)
        ranker = CorpusRanker(torch.tensor(self.corpus[0]), inner.item_vectors, inner.similarity, world)
        for first in range(0, len(ranker.ids), VECTORS):
            ids = ranker.ids[first : first + VECTORS].cpu().numpy()
            yield pa.table({"item_id": items.values(ids), "vector": _vectors(ranker.items[first : first + VECTORS])})

    @torch.no_grad()
    def _user_vectors(self, model: nn.Module, world: World, users: Vocabulary) -> Iterator[pa.Table]:
        inner = _plain(model)
        inner.eval()
        for batch in self.user_batches(world, target_from_end=0):
            moved = batch.to(world.device)
            assert batch.user_B is not None
            ids = batch.user_B[batch.valid_B].numpy()
            vectors_BD = inner.user_vectors(moved)[moved.valid_B]
            yield pa.table({USER_COLUMN: users.values(ids), "vector": _vectors(vectors_BD)})

    def _allowed(self, path: Path | None, items: Vocabulary) -> tuple[np.ndarray, np.ndarray, int]:
        """The candidates that a file names, their counts, and how many it names that are none; all without a file."""
        corpus_C, counts_C = self.corpus
        if path is None:
            return corpus_C, counts_C, 0
        listed = read_listed(path, items)
        allowed_C = np.isin(corpus_C, listed.ids_N)
        named = len(listed.ids_N) + len(listed.unknown_N)
        return corpus_C[allowed_C], counts_C[allowed_C], named - int(allowed_C.sum())

    def user_batches(self, world: World, *, target_from_end: int, rows_N: np.ndarray | None = None) -> UserBatches:
        """The users of the evaluation data, of this rank. rows_N: those in these rows of it; None: all."""
        settings = self.config.evaluation
        return evaluation_batches(
            self.evaluation_data,
            self.config.data,
            target_from_end=target_from_end,
            global_batch_size=settings.global_batch_size,
            filter_seen=settings.filter_seen,
            rank=world.rank,
            world_size=world.size,
            rows_N=rows_N,
        )

    def comparisons(self, split: Split) -> dict[str, Any]:
        """Metrics of the configured baselines on the same users; none where the training data is gone."""
        config = self.config
        if not Path(config.data.path).exists():
            log.warning("%s is not there: baselines, which are fitted on it, are left out", config.data.path)
            return {}
        if self.schema.item_cardinality > LARGEST_DENSE:
            log.warning("%s has raw item ids: baselines, which count by item, are left out", config.data.path)
            return {}
        targets = Targets(
            self.evaluation_data,
            TARGET_FROM_END[split],
            config.evaluation.filter_seen,
            config.data.max_length,
            config.data.on_bad_row,
        )
        names, holdout = config.evaluation.baselines, config.data.train_holdout
        scored = evaluate_baselines(self.train_data, targets, names=names, train_holdout=holdout)
        return {
            "baselines": {name: retrieval_metrics(each.rank_B) for name, each in scored.items()},
            "baseline_settings": {name: each.setting for name, each in scored.items() if each.setting},
        }

    @classmethod
    def tables(cls, report: Mapping[str, Any]) -> list[ReportTable]:
        title = f"{report['split']} split, {report['users']:,} users, seen items filtered: {report['filter_seen']}"
        return [ReportTable(title, {"model": report["model"], **report["baselines"]}, COLUMNS)]

    @classmethod
    def verdict(cls, report: Mapping[str, Any]) -> str | None:
        """The baseline that is furthest above the model in HR@10 or NDCG@10, if any is."""
        users, own = report["users"], report["model"]
        above = [
            (metrics[name] - own[name], baseline, name, metrics[name])
            for baseline, metrics in report["baselines"].items()
            for name in JUDGED
            if metrics[name] > own[name]
        ]
        if not above:
            return None
        _, baseline, name, value = max(above)
        error = math.sqrt(value * (1 - value) / users)
        return (
            f"below a baseline: {baseline} has {name} {value:.4f}, the model {own[name]:.4f} (one standard error is "
            f"{error:.4f} at most); choose epochs, model.dim, dropout and task by validation, or use it"
        )


def _plain(model: nn.Module) -> RetrievalModel:
    """The model itself, without what makes it run on several ranks."""
    inner = unwrapped(model)
    assert isinstance(inner, RetrievalModel)
    return inner


def _vectors(rows_ND: Tensor) -> pa.Array:
    """Rows as Arrow lists, list<float32> [N]."""
    N, D = rows_ND.shape
    flat = pa.array(rows_ND.float().cpu().numpy().reshape(-1))
    return pa.ListArray.from_arrays(pa.array(np.arange(N + 1, dtype=np.int32) * np.int32(D)), flat)


@torch.no_grad()
def corpus_ranks(
    model: RetrievalModel,
    batches: Iterable[EvaluationBatch],
    corpus_C: Tensor,
    world: World,
    weights: Weights | None = None,
) -> np.ndarray:
    """Leave-one-out over the full corpus: the place of each user's target, float64 [users], on every rank. 1 is best.

    weights: of another dense part than the model's, as RetrievalModel.queries has it.
    All ranks call it together, with as many batches each; the same numbers at every world size.
    """
    was_training = model.training
    model.eval()
    ranker = CorpusRanker(corpus_C, model.item_vectors, model.similarity, world)
    ranks, valid = [], []
    for batch in batches:
        batch = batch.to(world.device)
        ranks.append(ranker.ranks(model.user_vectors(batch, weights), batch))
        valid.append(batch.valid_B)
    model.train(was_training)
    everyone = torch.cat(world.all_gather_variable(torch.cat(ranks)))
    counted = torch.cat(world.all_gather_variable(torch.cat(valid).to(torch.int64))).bool()
    return everyone[counted].cpu().numpy()
