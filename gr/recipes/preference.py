"""Preference: a retrieval model fine-tuned on graded feedback, beside a frozen reference of itself.

Reward with a margin (arXiv 2307.09288), DPO (arXiv 2305.18290), S-DPO (arXiv 2406.09215).
"""

from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gr.batch import PreferenceBatch, move_ids
from gr.config.preference import PreferenceConfig
from gr.config.retrieval import RetrievalConfig
from gr.data.collate_preference import PreferenceCollate
from gr.data.history_batches import HistoryEpochs, UserBatches
from gr.data.loader import ResumableLoader
from gr.dist import World
from gr.embeddings import with_candidates
from gr.errors import CheckpointError, DataError
from gr.metrics.retrieval import paired_difference, retrieval_metrics, user_metrics
from gr.models.preference import PreferenceModel
from gr.parallel.dense import unwrapped
from gr.recipes.base import Evaluation, ReportTable, Split
from gr.recipes.retrieval import TARGET_FROM_END, RetrievalRecipe, corpus_ranks
from gr.tasks import CorpusRanker, Pairs, kl_divergence
from gr.training.module import Inputs

LIKED = ("hr@10", "ndcg@10", "mrr")
PAIRED = ("hr@10", "liked_hr@10")


class PreferenceObjective:
    """The loss of every position whose next item is compared with others."""

    def __init__(self, item_features: Mapping[str, Tensor]) -> None:
        self.item_features = item_features

    def losses(self, batch: PreferenceBatch) -> int:
        return int((batch.gap_TK[:, 0] > 0).sum())

    def examples(self, batch: PreferenceBatch) -> int:
        return batch.features.stride()

    def inputs(self, batch: PreferenceBatch, step: int, first: int, device: torch.device) -> Inputs:
        pairs = Pairs.of(batch)
        lookups = move_ids(with_candidates(batch.features, pairs.ids_N, self.item_features), device)
        return Inputs(batch.to(device), lookups, pairs.to(device))

    def total(self, model: nn.Module, inputs: Inputs, looked_up: Any) -> Tensor:
        return model(inputs.batch, inputs.candidates, looked_up)


class PreferenceRecipe(RetrievalRecipe):
    """Trains PreferenceModel from a retrieval checkpoint; evaluates as retrieval does, liked targets by themselves."""

    config: PreferenceConfig
    starts_from = ("retrieval",)

    @cached_property
    def collate(self) -> PreferenceCollate:
        return PreferenceCollate(self.schema, self.config.data, self.config.task, self.corpus[0])

    def check_data(self) -> None:
        super().check_data()
        self.config.task.levels.column(self.evaluation_data.schema)

    def check_saved(self, saved: RetrievalConfig, path: str) -> None:
        super().check_saved(saved, path)
        for key in ("temperature", "l2_norm"):
            before, now = getattr(saved.task, key), getattr(self.config.task, key)
            if before != now:
                raise CheckpointError(
                    f"{path} was trained with task.{key}={before}, not {now}: its scores would be others. Set it so"
                )
        if getattr(saved.task, "similarity", None) is not None:
            raise CheckpointError(
                f"{path} was trained with task.similarity, a mixture of logits; the preference stage compares products "
                "of vectors: begin from a run without it"
            )

    def begin(self, model: nn.Module) -> None:
        _plain(model).keep_reference()

    def objective(self, world: World) -> PreferenceObjective:  # type: ignore[override]
        return PreferenceObjective(self.item_features)

    def loader(self, world: World) -> ResumableLoader[PreferenceBatch]:  # type: ignore[override]
        """Raises DataError where no user has a pair: nothing would be trained."""
        self.check_targets()
        if not self._some_user_has_a_pair():
            raise DataError(
                f"{self.train_data.path}: no event of level task.chosen={self.config.task.chosen} or more is followed "
                "by one of a lower level, so there is no pair to train on: choose other task.levels"
            )
        epochs = HistoryEpochs(
            self.train_data,
            self.config.data,
            self.collate,
            columns=self.collate.columns,
            seed=self.config.seed,
            global_batch_size=self.config.trainer.global_batch_size,
            rank=world.rank,
            world_size=world.size,
        )
        return ResumableLoader(epochs)

    def _some_user_has_a_pair(self) -> bool:
        """Reads row groups until there is one: mostly the first."""
        data, collate = self.train_data, self.collate
        for index in range(len(data.row_groups)):
            group = data.read_row_group(index, [collate.level_column], self.config.data.on_bad_row)
            user_T = np.repeat(np.arange(len(group.lengths_B)), group.lengths_B)
            levels_T = collate.levels(group.columns[collate.level_column])
            falls_T = (np.diff(levels_T) < 0) & (np.diff(user_T) == 0) & (levels_T[:-1] >= self.config.task.chosen)
            if falls_T.any():
                return True
        return False

    def _sequence_flops(self) -> Callable[[np.ndarray], np.ndarray]:
        """A step runs the tower forward and backward, three times its forward pass, and the reference forward."""
        trained = super()._sequence_flops()
        return lambda events_N: trained(events_N) * (4 / 3)

    def evaluate(self, model: nn.Module, world: World, split: Split) -> Evaluation:
        """Retrieval's metrics, with liked_hr@10, liked_ndcg@10 and liked_mrr over the users with a liked target.

        level_of_top@10 is how much users liked, later, what is in their top 10: a user's held-out event is all that is
        known of later, so that it is the mean level of the targets that are there.

        On the test split the reference is evaluated too: details and arrays have the same of it, and the differences.
        """
        evaluated = super().evaluate(model, world, split)
        levels = self._target_levels(split)
        is_liked = levels >= self.config.task.liked
        metrics = self._with_levels(evaluated.arrays["ranks"], levels)
        if split == "validation":
            return Evaluation(metrics, evaluated.details, evaluated.arrays)
        inner = _plain(model)
        batches = self.user_batches(world, target_from_end=TARGET_FROM_END[split])
        ranks = corpus_ranks(inner, batches, torch.tensor(self.corpus[0]), world, inner.reference)
        reference = self._with_levels(ranks, levels)
        own, before = user_metrics(evaluated.arrays["ranks"])["hr@10"], user_metrics(ranks)["hr@10"]
        change = {
            name: paired_difference(own[chosen], before[chosen]) if chosen.sum() > 1 else None
            for name, chosen in (("hr@10", np.ones_like(is_liked)), ("liked_hr@10", is_liked))
        }
        details = evaluated.details | {
            "liked_users": int(is_liked.sum()),
            "reference": reference,
            "change_and_standard_error": change,
            "kl_to_reference": self._kl_to_reference(inner, world, split),
        }
        if not self.config.evaluates_training_users or self.config.data.train_holdout >= 2:
            details["held_out_pairs"] = self._held_out_pairs(inner, world)
        return Evaluation(metrics, details, evaluated.arrays | {"ranks-reference": ranks, "is-liked": is_liked})

    def _with_levels(self, ranks: np.ndarray, levels: np.ndarray) -> dict[str, float | None]:
        """The metrics of all users, those over liked targets, and the mean level of the targets in the top 10."""
        is_liked, in_top = levels >= self.config.task.liked, ranks <= 10
        liked = retrieval_metrics(ranks[is_liked]) if is_liked.any() else {}
        of_top = float(levels[in_top].mean()) if in_top.any() else None
        return {
            **retrieval_metrics(ranks),
            **{f"liked_{name}": liked.get(name) for name in LIKED},
            "level_of_top@10": of_top,
        }

    @cache  # noqa: B019  a recipe lives as long as its run
    def _target_levels(self, split: Split) -> np.ndarray:
        """The level of each evaluated user's target, int64 [users], in the order of the data."""
        data, collate, from_end = self.evaluation_data, self.collate, TARGET_FROM_END[split]
        levels = []
        for index in range(len(data.row_groups)):
            group = data.read_row_group(index, [collate.level_column], self.config.data.on_bad_row)
            target_P = group.offsets[1:][group.lengths_B > from_end] - from_end
            levels.append(collate.levels(group.columns[collate.level_column][target_P]))
        return np.concatenate(levels)

    @torch.no_grad()
    def _kl_to_reference(self, model: PreferenceModel, world: World, split: Split) -> float:
        """The mean over users of KL(model || reference) of the softmax of the scores over the corpus, in nats."""
        ranker = CorpusRanker(torch.tensor(self.corpus[0]), model.item_vectors, model.similarity, world)
        total = users = 0.0
        for batch in self.user_batches(world, target_from_end=TARGET_FROM_END[split]):
            moved = batch.to(world.device)
            both = (model.user_vectors(moved), model.user_vectors(moved, model.reference))
            own_QD, reference_QD = (
                torch.cat(world.all_gather_variable(queries_BD.flatten())).view(-1, model.dim) for queries_BD in both
            )
            is_valid_Q = torch.cat(world.all_gather_variable(moved.valid_B.long())).bool()
            divergence_Q = kl_divergence(own_QD, reference_QD, ranker.items, world)
            total, users = total + float(divergence_Q[is_valid_Q].double().sum()), users + float(is_valid_Q.sum())
        return total / users

    @torch.no_grad()
    def _held_out_pairs(self, model: PreferenceModel, world: World) -> dict[str, float | None]:
        """Shares of the pairs of users' two newest events whose better liked item scores higher, a tie being half: by
        the model, by the reference, and by the model's gain over it (the implicit reward).
        """
        settings, collate = self.config.evaluation, self.collate
        batches = UserBatches(
            self.evaluation_data,
            self.config.data,
            collate.held_out,
            columns=collate.columns,
            global_batch_size=settings.global_batch_size,
            rank=world.rank,
            world_size=world.size,
        )
        counts = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            pairs = Pairs.of(batch).to(world.device)
            own_P2, reference_P2 = model.scores(batch.to(world.device), pairs)
            for row, scores_P2 in enumerate((own_P2, reference_P2, own_P2 - reference_P2)):
                ahead_P = scores_P2[:, 0] - scores_P2[:, 1]
                counts[row] += float(ahead_P.sign().double().sum() / 2 + len(ahead_P) / 2)
            counts[3] += len(own_P2)
        *right, pairs_counted = world.all_reduce_sum(counts.tolist())
        names = ("accuracy", "reference_accuracy", "implicit_reward_accuracy")
        shares = {name: n / pairs_counted if pairs_counted else None for name, n in zip(names, right, strict=True)}
        return {"pairs": pairs_counted, **shares}

    @classmethod
    def tables(cls, report: Mapping[str, Any]) -> list[ReportTable]:
        tables = super().tables(report)
        if "reference" in report:
            rows = {"model": report["model"], "reference": report["reference"]}
            title = f"liked targets, {report['liked_users']:,} users"
            tables[0].rows["reference"] = report["reference"]  # type: ignore[index]
            tables.append(ReportTable(title, rows, [*(f"liked_{name}" for name in LIKED), "level_of_top@10"]))
        return tables


def _plain(model: nn.Module) -> PreferenceModel:
    inner = unwrapped(model)
    assert isinstance(inner, PreferenceModel)
    return inner
