"""Tokens against a slow definition; who can see what; one prediction, whoever is predicted beside it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gr.batch import ITEM_FEATURE, RankingBatch
from gr.models.preprocessor import interleave
from gr.models.sequence_ranking import SequenceRanker
from tests.support.tiny_histories import ITEMS, SCHEMA, tiny_ranking_config

FORMS = {
    "all": {},
    "all, hstu": {"tower": {"kind": "hstu", "layers": 2, "heads": 2, "qk_dim": 4, "v_dim": 4, "dropout": 0.0,
                            "time_bias": True}},
    "all, sasrec": {"tower": {"kind": "sasrec", "layers": 2, "heads": 2, "ffn_dim": 8, "dropout": 0.0}},
    "interleaved candidates": {"candidates": True},
    "additive candidates": {"candidates": True, "input": {"kind": "additive"}},
}  # fmt: skip


def model_of(form: str) -> SequenceRanker:
    changes: dict[str, Any] = dict(FORMS[form])
    candidates = changes.pop("candidates", False)
    base = tiny_ranking_config()
    config = tiny_ranking_config(
        model={**base.model.model_dump(), **changes},
        task={**base.task.model_dump(), "supervision": "candidates" if candidates else "all"},
    )
    with torch.device("meta"):
        model = SequenceRanker(config, SCHEMA)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def batch_of(lengths: list[int], scored: list[int], seed: int = 0) -> RankingBatch:
    random = np.random.default_rng(seed)
    events, examples = sum(lengths), len(lengths)
    some = np.array(lengths) > 0
    context = random.integers(0, 45, examples)[some]
    actions = random.integers(0, 4, events)
    labels = np.stack([actions & 1, actions >> 1, random.random(events)], axis=1).astype(np.float32)
    ids = [random.integers(1, ITEMS, events), random.integers(0, 43, events), context]
    return RankingBatch(
        features=KeyedJaggedTensor(
            keys=[ITEM_FEATURE, "category", "country"],
            values=torch.from_numpy(np.concatenate(ids)),
            lengths=torch.tensor([*lengths, *lengths, *some.astype(int)]),
        ),
        actions_T=torch.from_numpy(actions),
        labels_TC=torch.from_numpy(labels),
        timestamps_T=torch.from_numpy(np.sort(random.integers(0, 10**6, events))),
        numeric_BK=torch.from_numpy(random.random((examples, 1)).astype(np.float32)),
        user_B=torch.arange(examples),
        scored_B=torch.tensor(scored),
        scored=sum(scored),
        first_example=0,
    )


def with_item(batch: RankingBatch, event: int, item: int) -> RankingBatch:
    values = batch.features.values().clone()
    values[event] = item
    features = KeyedJaggedTensor(keys=batch.features.keys(), values=values, lengths=batch.features.lengths())
    return replace(batch, features=features)


def with_actions(batch: RankingBatch, event: int, actions: int) -> RankingBatch:
    changed = batch.actions_T.clone()
    changed[event] = actions
    return replace(batch, actions_T=changed)


def moved(before: Tensor, after: Tensor) -> list[bool]:
    return (before != after).any(1).tolist()


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5), st.integers(0, 2), st.booleans()
)
def test_layout(drawn: list[tuple[int, int]], contextual: int, interleaved: bool) -> None:
    lengths = [length for length, _ in drawn]
    candidates = [min(candidate, length) for length, candidate in drawn]
    layout = interleave(torch.tensor(lengths), torch.tensor(candidates), contextual, interleaved)
    place, items, actions, context, offsets = 0, [], [], [], [0]
    for length, candidate in zip(lengths, candidates, strict=True):
        if length:
            context.append([place + c for c in range(contextual)])
            place += contextual
        for event in range(length):
            items.append(place)
            place += 1
            if interleaved and event < length - candidate:
                actions.append(place)
                place += 1
        offsets.append(place)
    assert layout.offsets_B1.tolist() == offsets
    assert layout.item_T.tolist() == items
    assert layout.action_A.tolist() == actions
    assert layout.context_CB.T.tolist() == context


class TestSupervisionOfAll:
    @pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("all")])
    @torch.no_grad()
    def test_a_prediction_knows_what_came_before_and_its_item_only(self, form: str) -> None:
        model, batch = model_of(form), batch_of([6], [6])
        before = model(batch)
        assert before.shape == (6, 3)
        assert moved(before, model(with_item(batch, 3, 7))) == [False] * 3 + [True] * 3
        assert moved(before, model(with_actions(batch, 3, 3 - int(batch.actions_T[3])))) == [False] * 4 + [True] * 2
        assert batch.timestamps_T is not None
        later = batch.timestamps_T.clone()
        later[4:] += 10**7
        assert moved(before, model(replace(batch, timestamps_T=later)))[:4] == [False] * 4
        old = replace(batch, numeric_BK=batch.numeric_BK + 1)
        assert all(moved(before, model(old)))

    @pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("all")])
    @torch.no_grad()
    def test_nor_that_anything_comes_after(self, form: str) -> None:
        model, batch = model_of(form), batch_of([9], [9])
        ids, kept = batch.features.values(), [0, 1, 2, 3, 4]
        assert batch.timestamps_T is not None
        shorter = replace(
            batch,
            features=KeyedJaggedTensor(
                keys=batch.features.keys(),
                values=torch.cat([ids[kept], ids[9:18][kept], ids[18:]]),
                lengths=torch.tensor([5, 5, 1]),
            ),
            actions_T=batch.actions_T[kept],
            labels_TC=batch.labels_TC[kept],
            timestamps_T=batch.timestamps_T[kept],
            scored_B=torch.tensor([5]),
            scored=5,
        )
        torch.testing.assert_close(model(batch)[:5], model(shorter), rtol=1e-5, atol=1e-6)

    @torch.no_grad()
    def test_scoring_the_newest_gives_the_same_as_scoring_all(self) -> None:
        model, batch = model_of("all"), batch_of([6, 0, 3], [6, 0, 3])
        every = model(batch)
        newest = model(replace(batch, scored_B=torch.tensor([2, 0, 1]), scored=3))
        torch.testing.assert_close(newest, every[[4, 5, 8]])

    @torch.no_grad()
    def test_batch_mates_do_not_matter(self) -> None:
        model = model_of("all")
        batch = batch_of([5], [5])
        alone = model(batch)
        mates = batch_of([5, 9], [5, 9])
        ids = mates.features.values().clone()
        ids[:5], ids[14:19] = batch.features.values()[:5], batch.features.values()[5:10]
        ids[28] = batch.features.values()[10]
        features = KeyedJaggedTensor(keys=mates.features.keys(), values=ids, lengths=mates.features.lengths())
        assert mates.timestamps_T is not None and batch.timestamps_T is not None
        both = replace(
            mates,
            features=features,
            actions_T=torch.cat([batch.actions_T, mates.actions_T[5:]]),
            timestamps_T=torch.cat([batch.timestamps_T, mates.timestamps_T[5:]]),
            numeric_BK=torch.cat([batch.numeric_BK, mates.numeric_BK[1:]]),
        )
        torch.testing.assert_close(model(both)[:5], alone)


@pytest.mark.parametrize("form", [form for form in FORMS if form.endswith("candidates")])
class TestCandidates:
    @torch.no_grad()
    def test_do_not_see_each_other(self, form: str) -> None:
        model, batch = model_of(form), batch_of([7], [3])
        before = model(batch)
        assert before.shape == (3, 3)
        assert moved(before, model(with_item(batch, 5, 7))) == [False, True, False]
        assert all(moved(before, model(with_item(batch, 2, 7))))

    @torch.no_grad()
    def test_do_not_show_their_actions(self, form: str) -> None:
        model, batch = model_of(form), batch_of([7], [3])
        before = model(batch)
        for event in (4, 5, 6):
            after = model(with_actions(batch, event, 3 - int(batch.actions_T[event])))
            torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert all(moved(before, model(with_actions(batch, 1, 3 - int(batch.actions_T[1])))))

    @torch.no_grad()
    def test_at_once_equal_each_alone(self, form: str) -> None:
        model, batch = model_of(form), batch_of([7], [3])
        assert batch.timestamps_T is not None
        batch.timestamps_T[4:] = batch.timestamps_T[4]  # one request
        together = model(batch)
        ids = batch.features.values()
        for candidate in range(3):
            kept = [0, 1, 2, 3, 4 + candidate]
            values = torch.cat([ids[kept], ids[7:14][kept], ids[14:]])
            alone = replace(
                batch,
                features=KeyedJaggedTensor(keys=batch.features.keys(), values=values, lengths=torch.tensor([5, 5, 1])),
                actions_T=batch.actions_T[kept],
                labels_TC=batch.labels_TC[kept],
                timestamps_T=batch.timestamps_T[kept],
                scored_B=torch.tensor([1]),
                scored=1,
            )
            torch.testing.assert_close(model(alone)[0], together[candidate], rtol=1e-5, atol=1e-6)


def test_empty_batch_has_a_gradient() -> None:
    """A rank may have no event; DDP still waits for its gradients."""
    for form in FORMS:
        model = model_of(form).train()
        for parameter in model.parameters():
            parameter.grad = None
        model(batch_of([0, 0], [0, 0])).sum().backward()
        model(batch_of([4, 0], [2, 0])).sum().backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert missing == [], form


def test_targets() -> None:
    batch = batch_of([3, 0, 4], [2, 0, 1])
    labels, users = batch.targets()
    assert torch.equal(labels, batch.labels_TC[[1, 2, 6]])
    assert users.tolist() == [0, 0, 2]
