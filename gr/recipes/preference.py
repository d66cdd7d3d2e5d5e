"""Preference: a retrieval model fine-tuned on graded feedback, beside a frozen reference of itself.

On pairs: reward with a margin (arXiv 2307.09288), DPO (arXiv 2305.18290), S-DPO (arXiv 2406.09215). On lists that a
reward model scores: rejection sampling, PPO (arXiv 2307.09288).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gr.batch import PreferenceBatch, PromptBatch, move_ids
from gr.checkpoint import resolve, verify
from gr.checkpoint.layout import CONFIG
from gr.checkpoint.plain import load_weights
from gr.config import load_config
from gr.config.preference import ListLoss, PreferenceConfig, RewardLoss
from gr.config.retrieval import RetrievalConfig
from gr.data.collate_preference import PreferenceCollate
from gr.data.history_batches import HistoryEpochs, UserBatches
from gr.data.loader import ResumableLoader
from gr.dist import World
from gr.embeddings import with_candidates
from gr.errors import CheckpointError, ConfigError, DataError
from gr.metrics.retrieval import mean_difference, paired_difference, retrieval_metrics, user_metrics
from gr.models.preference import PreferenceModel
from gr.models.retrieval import Weights
from gr.ops.sampled_logits import sampled_logits
from gr.parallel.dense import unwrapped
from gr.recipes.base import Evaluation, ReportTable, Split
from gr.recipes.policy import PolicyObjective
from gr.recipes.retrieval import TARGET_FROM_END, RetrievalRecipe, corpus_ranks
from gr.tasks import CorpusRanker, Pairs, kl_divergence
from gr.training.module import Inputs

LIKED = ("hr@10", "ndcg@10", "mrr")


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


@dataclass(frozen=True)
class LaterTop:
    """A top 10 and the W later events of each user. is_there_UW: bool, those whose item is in it."""

    metrics: dict[str, float | None]
    is_there_UW: np.ndarray


class PreferenceRecipe(RetrievalRecipe):
    """Trains PreferenceModel from a retrieval checkpoint; evaluates as retrieval does, liked targets by themselves."""

    config: PreferenceConfig
    starts_from = ("retrieval",)
    added = ("value.",)

    @cached_property
    def collate(self) -> PreferenceCollate:
        return PreferenceCollate(self.schema, self.config.data, self.config.task, self.corpus[0])

    def check_data(self) -> None:
        super().check_data()
        self.config.task.levels.column(self.evaluation_data.schema)
        loss, length, items = self.config.task.loss, self.config.data.max_length, len(self.corpus[0])
        if isinstance(loss, ListLoss) and loss.candidates + length > items:
            raise ConfigError(
                f"task.loss.candidates={loss.candidates} and data.max_length={length}, of a history, are more than all "
                f"{items} items: set them to {items} together, or less"
            )

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

    def begin(self, model: nn.Module, world: World) -> None:
        inner = _plain(model)
        inner.keep(inner.reference)
        if isinstance(self.config.task.loss, ListLoss):
            path = resolve(self.config.task.loss.reward)
            verify(path, world)
            self._load_reward(inner, path)

    def _load_reward(self, model: PreferenceModel, path: Path) -> None:
        """The dense part of a reward model, whose tables are this model's if it began from the same weights."""
        saved = load_config(path / CONFIG, plugins=self.config.plugins)
        if not isinstance(saved, PreferenceConfig) or not isinstance(saved.task.loss, RewardLoss):
            raise CheckpointError(f"{path} is no reward model: set task.loss.reward to a run of task.loss.kind=reward")
        self.check_saved(saved, str(path))
        began = {name: torch.empty_like(parameter) for name, parameter in model.reference.named_parameters()}
        reward = {name: parameter.detach() for name, parameter in model.reward.named_parameters()}
        load_weights(path, reward | {f"reference.{name}": value for name, value in began.items()}, {}, {})
        for name, parameter in model.reference.named_parameters():
            if not torch.equal(parameter, began[name]):
                raise CheckpointError(
                    f"{path} began from other weights than this run ({name} differs), so that its tables are others: "
                    "begin both from one checkpoint (checkpoint.load_from)"
                )

    def objective(self, world: World) -> PreferenceObjective | PolicyObjective:  # type: ignore[override]
        if isinstance(self.config.task.loss, ListLoss):
            return PolicyObjective(self.config, self.corpus[0], self.item_features, world)
        return PreferenceObjective(self.item_features)

    def loader(self, world: World) -> ResumableLoader[PreferenceBatch | PromptBatch]:  # type: ignore[override]
        """Raises DataError where no user has a pair that the loss needs: nothing would be trained."""
        self.check_targets()
        is_of_lists = isinstance(self.config.task.loss, ListLoss)
        if not is_of_lists and not self._some_user_has_a_pair():
            raise DataError(
                f"{self.train_data.path}: no event of level task.chosen={self.config.task.chosen} or more is followed "
                "by one of a lower level, so there is no pair to train on: choose other task.levels"
            )
        epochs = HistoryEpochs(
            self.train_data,
            self.config.data,
            self.collate.prompts if is_of_lists else self.collate,
            columns=None if is_of_lists else self.collate.columns,
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
        """A step runs the tower forward and backward, three times its forward pass, and each frozen copy forward."""
        trained, passes = super()._sequence_flops(), 3 + self.config.task.loss.frozen_copies
        return lambda events_N: trained(events_N) * (passes / 3)

    def evaluate(self, model: nn.Module, world: World, split: Split) -> Evaluation:
        """Retrieval's metrics, with liked_hr@10, liked_ndcg@10 and liked_mrr over the users with a liked target.

        level_of_top@10 is the mean level of the targets that are in their user's top 10.

        On the test split the reference is evaluated too: details and arrays have the same of it, and the differences.
        There both have what _later() measures: later_rating_of_top@10, the mean of what users rated items of their top
        10 in the evaluation.later events after it, and later_in_top@10, how many events that were.
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
        _, ratings_UW, about_later = self._later_events()
        later, later_before = (self._later(inner, world, weights) for weights in (inner, inner.reference))
        reference = self._with_levels(ranks, levels) | later_before.metrics
        metrics |= later.metrics
        own, before = user_metrics(evaluated.arrays["ranks"])["hr@10"], user_metrics(ranks)["hr@10"]
        change = {
            name: paired_difference(own[chosen], before[chosen]) if chosen.sum() > 1 else None
            for name, chosen in (("hr@10", np.ones_like(is_liked)), ("liked_hr@10", is_liked))
        }
        change["later_rating_of_top@10"] = mean_difference(ratings_UW, later.is_there_UW, later_before.is_there_UW)
        details = evaluated.details | {
            "liked_users": int(is_liked.sum()),
            "reference": reference,
            "later": about_later,
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

    @cache  # noqa: B019  as above
    def _later_events(self) -> tuple[np.ndarray, np.ndarray, dict[str, float | None]]:
        """The newest W events of the users that have a history before them: items, int64 [U, W], and how they were
        rated, float64 [U, W], their level where task.levels has no ratings. And their number, W, and the mean of all.
        """
        data, collate, W = self.evaluation_data, self.collate, self.config.later_events
        items, ratings = [np.empty((0, W), np.int64)], [np.empty((0, W))]
        for index in range(len(data.row_groups)):
            group = data.read_row_group(index, [collate.level_column], self.config.data.on_bad_row)
            place_UW = group.offsets[1:][group.lengths_B > W][:, None] - np.arange(W, 0, -1)
            values_UW = group.columns[collate.level_column][place_UW]
            items.append(group.columns["item_ids"][place_UW])
            is_rated = collate.level_column == "ratings"
            ratings.append(values_UW if is_rated else collate.levels(values_UW.ravel()).reshape(-1, W))
        items_UW, ratings_UW = np.concatenate(items), np.concatenate(ratings).astype(np.float64)
        mean = float(ratings_UW.mean()) if ratings_UW.size else None
        return items_UW, ratings_UW, {"events_of_a_user": W, "events": ratings_UW.size, "mean_rating": mean}

    @torch.no_grad()
    def _later(self, model: PreferenceModel, world: World, weights: Weights) -> LaterTop:
        """later_rating_of_top@10 and later_in_top@10 of a dense part, after the history before those events; and
        reward_of_top@10, the mean of what the reward model of lists gives the items of that top 10.
        """
        items_UW, ratings_UW, _ = self._later_events()
        ranker = CorpusRanker(torch.tensor(self.corpus[0]), model.item_vectors, model.similarity, world)
        top, rewards = [], []
        for batch in self.user_batches(world, target_from_end=self.config.later_events):
            moved = batch.to(world.device)
            ids_BK, _ = ranker.top(model.user_vectors(moved, weights), moved, 10)
            top.append(ids_BK[moved.valid_B].flatten())
            if isinstance(model.loss, ListLoss):
                ids_N, item_BK = ids_BK.unique(return_inverse=True)
                items_ND = model.similarity.items(model.item_vectors(ids_N).float())
                rewards_BK = sampled_logits(model.user_vectors(moved, model.reward), items_ND, item_BK)
                rewards.append(float(rewards_BK[moved.valid_B].double().sum()))
        top_UK = torch.cat(world.all_gather_variable(torch.cat(top))).view(-1, 10).cpu().numpy()
        is_there_UW = (items_UW[:, :, None] == top_UK[:, None, :]).any(2)
        mean = float(ratings_UW[is_there_UW].mean()) if is_there_UW.any() else None
        measured: dict[str, float | None] = {
            "later_rating_of_top@10": mean,
            "later_in_top@10": float(is_there_UW.sum()),
        }
        if isinstance(model.loss, ListLoss):
            measured["reward_of_top@10"] = world.all_reduce_sum([sum(rewards)])[0] / max(1, top_UK.size)
        return LaterTop(measured, is_there_UW)

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
            tables.append(ReportTable(title, rows, [*(f"liked_{name}" for name in LIKED), "later_rating_of_top@10"]))
        return tables


def _plain(model: nn.Module) -> PreferenceModel:
    inner = unwrapped(model)
    assert isinstance(inner, PreferenceModel)
    return inner
