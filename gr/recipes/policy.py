"""The objective of a preference run whose lists a policy draws and a reward model scores: rejection sampling and PPO.

P histories of this rank, S candidates of each, N distinct ones; D width.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr.batch import EvaluationBatch, PromptBatch, move_ids
from gr.config.preference import PPOLoss, PreferenceConfig, RejectionLoss
from gr.data.stochastic_length import LIST, Draws
from gr.dist import World
from gr.embeddings import with_candidates
from gr.models.preference import PreferenceModel
from gr.parallel.dense import unwrapped
from gr.tasks import CorpusRanker, Prompts, Rollout
from gr.tasks.policy import drawn_lists, list_log_probability, list_score, mean_and_deviation, penalised_reward
from gr.training.module import Inputs


class PolicyObjective:
    """The loss of the list that is drawn after the newest event of each history.

    The tables are frozen, so that the vectors of the corpus are looked up once, at the first step.
    """

    def __init__(
        self, config: PreferenceConfig, corpus_C: np.ndarray, item_features: Mapping[str, Tensor], world: World
    ) -> None:
        loss = config.task.loss
        assert isinstance(loss, RejectionLoss | PPOLoss)
        self.loss, self.seed, self.item_features, self.world = loss, config.seed, item_features, world
        self.filters_seen = config.evaluation.filter_seen != "none"
        self.corpus_C = torch.tensor(corpus_C)
        self.ranker: CorpusRanker | None = None

    def losses(self, batch: PromptBatch) -> int:
        return int((batch.features.lengths() > 0).sum())

    def examples(self, batch: PromptBatch) -> int:
        return batch.features.stride()

    def inputs(self, batch: PromptBatch, step: int, first: int, device: torch.device) -> Inputs:
        number_P = batch.number_B[batch.features.lengths() > 0].numpy()
        S = self.loss.candidates
        place_PS = np.tile(np.arange(S), len(number_P))
        uniform = Draws(self.seed, number_P).uniform(LIST, number_P.repeat(S), place_PS).reshape(len(number_P), S)
        noise_PS = torch.from_numpy(-np.log(-np.log(uniform))).float()
        renews = isinstance(self.loss, PPOLoss) and step % self.loss.steps_per_policy == 0
        nothing = batch.target_ids_T.new_empty(0)
        lookups = move_ids(with_candidates(batch.features, nothing, self.item_features), device)
        return Inputs(batch.to(device), lookups, Prompts(noise_PS, renews).to(device))

    def total(self, model: nn.Module, inputs: Inputs, looked_up: Any) -> Tensor:
        inner = unwrapped(model)
        assert isinstance(inner, PreferenceModel)
        return model(inputs.batch, self.rollout(inner, inputs.batch, inputs.candidates, looked_up), looked_up)

    @torch.no_grad()
    def rollout(self, model: PreferenceModel, batch: PromptBatch, prompts: Prompts, looked_up: Any) -> Rollout:
        """Draws a list after each history and scores it. Collective."""
        if prompts.renews:
            model.keep(model.drawing)
        if self.ranker is None:
            self.ranker = CorpusRanker(self.corpus_C, model.item_vectors, model.similarity, self.world)
        lengths_B = batch.features.lengths().long()
        place_P = (lengths_B.cumsum(0) - 1)[lengths_B > 0]
        is_ppo = isinstance(self.loss, PPOLoss)
        drawing_PD, reward_PD = (
            model.prompt_queries(batch, place_P, looked_up, weights)
            for weights in (model.drawing if is_ppo else model.reference, model.reward)
        )
        ids_N, item_PS = self._candidates(drawing_PD * model.similarity.scale, batch).unique(return_inverse=True)
        items_ND = model.similarity.items(model.item_vectors(ids_N).float())
        scores_PS, rewards_PS = (
            model.candidate_scores(queries_PD, items_ND, item_PS) for queries_PD in (drawing_PD, reward_PD)
        )
        order_PL = drawn_lists(scores_PS, prompts.noise_PS, self.loss.drawn)
        if not isinstance(self.loss, PPOLoss):
            best_P1 = order_PL.gather(1, rewards_PS.gather(1, order_PL).argmax(1, keepdim=True))
            return Rollout(place_P, items_ND, item_PS, best_P1)
        reference_PD = model.prompt_queries(batch, place_P, looked_up, model.reference)
        old_P, reference_P = (
            list_log_probability(each_PS, order_PL)
            for each_PS in (scores_PS, model.candidate_scores(reference_PD, items_ND, item_PS))
        )
        score_P = list_score(rewards_PS, order_PL)
        mean, deviation = mean_and_deviation(score_P, self.world)
        reward_P = penalised_reward((score_P - mean) / deviation, old_P, reference_P, self.loss.beta)
        expected_P = ((scores_PS.softmax(1) * rewards_PS).sum(1) - mean) / deviation
        return Rollout(place_P, items_ND, item_PS, order_PL, old_P, reward_P, expected_P)

    def _candidates(self, queries_PD: Tensor, batch: PromptBatch) -> Tensor:
        """The ids of the S best items after each history, int64 [P, S], best first. Collective."""
        assert self.ranker is not None
        P = len(queries_PD)
        most = max(count for (count,) in self.world.all_gather_ints([P]))
        lengths_B = batch.features.lengths().long()
        seen_P = lengths_B[lengths_B > 0] if self.filters_seen else lengths_B.new_zeros(P)
        offsets = F.pad(seen_P.cumsum(0), (1, most - P))
        offsets[P + 1 :] = offsets[P]
        nothing = lengths_B.new_zeros(most)
        asked = EvaluationBatch(
            features=batch.features,
            timestamps_T=None,
            query_timestamps_T=None,
            target_ids_B=nothing,
            valid_B=nothing.bool(),
            seen_ids=batch.features.values() if self.filters_seen else nothing[:0],
            seen_offsets=offsets,
        )
        return self.ranker.top(F.pad(queries_PD, (0, 0, 0, most - P)), asked, self.loss.candidates)[0][:P]
