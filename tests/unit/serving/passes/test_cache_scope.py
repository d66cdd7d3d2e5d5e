"""What may be cached across requests: the rule, and what the towers and inputs do when events are added."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gr.batch import RankingBatch
from gr.models.sequence_ranking import SequenceRanker
from gr.sequence import JaggedSequence
from gr.serving.passes.cache_scope import cache_scope
from tests.support.tiny_histories import SCHEMA, tiny_ranking_config
from tests.unit.models.test_sequence_ranking import batch_of
from tests.unit.serving.passes.test_ranking import HSTU, LLAMA, SASREC, STU

HISTORY, MORE = 70, 80
PLAIN_HSTU = {**HSTU, "position_bias": False}
TOWERS: dict[str, tuple[dict[str, Any], str]] = {
    "stu": (STU, "user"),
    "window": ({**STU, "max_attn_len": 5}, "user"),
    "group norm": ({**STU, "group_norm": True}, "user"),
    "constant divisor": ({**STU, "divisor": 7.0}, "user"),
    "full attention": ({**STU, "max_attn_len": 5, "min_full_attn_seq_len": 4}, "request"),
    "hstu": (HSTU, "user"),
    "hstu max_len": ({**HSTU, "divisor": "max_len"}, "user"),
    "hstu actual_len": ({**HSTU, "divisor": "actual_len"}, "request"),
    "hstu time_bias": ({**HSTU, "time_bias": True}, "request"),
    "hstu softmax": ({**PLAIN_HSTU, "attention": "softmax"}, "request"),
    "sasrec": (SASREC, "request"),
    "llama": (LLAMA, "request"),
}


def ranker(place: str, supervision: str, tower: dict[str, Any]) -> SequenceRanker:
    base = tiny_ranking_config()
    config = tiny_ranking_config(
        data={**base.data.model_dump(), "max_length": 100},
        model={**base.model.model_dump(), "place": place, "tower": tower, "input_dropout": 0.0},
        task={**base.task.model_dump(), "supervision": supervision},
    )
    with torch.device("meta"):
        model = SequenceRanker(config, SCHEMA)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.scope = cache_scope(config)
    return model.eval()


@pytest.mark.parametrize("form", TOWERS)
@torch.no_grad()
def test_the_tower_does_what_the_scope_says(form: str) -> None:
    """User scope: added events change no bit of what was computed for those before them. Request scope: some change."""
    tower, lifetime = TOWERS[form]
    refused_with_all = form in ("full attention", "hstu actual_len")
    if form == "hstu actual_len":  # no ranking model may have it, so the rule is asked about the tower alone
        model = ranker("absolute", "all", HSTU)
        built = type(model.tower)(
            type(model.tower.config).model_validate(tower), dim=8, max_length=model.tokens.max_length
        )
        built.load_state_dict(model.tower.state_dict(), strict=False)
        model.tower = built.eval()
    else:
        model = ranker("absolute", "candidates" if refused_with_all else "all", tower)
        assert model.scope.lifetime == lifetime and model.scope.reason
    torch.manual_seed(0)
    x_TD, times = torch.randn(MORE, 8), torch.arange(1, MORE + 1) * 1000

    def run(tokens: int) -> Tensor:
        following = F.pad(times[1:tokens], (0, 1), value=int(times[tokens - 1]))
        offsets = torch.tensor([0, tokens])
        return model.tower(
            JaggedSequence(x_TD[:tokens], offsets, model.tokens.max_length, times[:tokens], following)
        ).values_TD

    unchanged = torch.equal(run(HISTORY), run(MORE)[:HISTORY])
    assert unchanged or lifetime == "request"
    if form not in ("hstu softmax", "sasrec", "llama"):  # their last bits may or may not differ
        assert unchanged == (lifetime == "user")


def one_more(batch: RankingBatch, events: int) -> RankingBatch:
    """The first `events` events of a batch of one example."""
    total, ids = len(batch.actions_T), batch.features.values()
    assert batch.timestamps_T is not None
    return replace(
        batch,
        features=KeyedJaggedTensor(
            keys=batch.features.keys(),
            values=torch.cat([ids[:events], ids[total : total + events], ids[2 * total :]]),
            lengths=torch.tensor([events, events, 1]),
        ),
        actions_T=batch.actions_T[:events],
        labels_TC=batch.labels_TC[:events],
        timestamps_T=batch.timestamps_T[:events],
    )


@pytest.mark.parametrize(
    ("place", "supervision", "lifetime"),
    [("request", "candidates", "request"), ("absolute", "candidates", "user"), ("request", "all", "user")],
)
@torch.no_grad()
def test_the_input_does_what_the_scope_says(place: str, supervision: str, lifetime: str) -> None:
    model, history = ranker(place, supervision, STU), 9
    assert model.scope.lifetime == lifetime
    assert ("model.place=request" in model.scope.reason) == (lifetime == "request")
    batch = batch_of([20], [1])

    def tokens(events: int) -> tuple[Tensor, int]:
        cut = one_more(batch, events)
        looked_up = model.tables(cut.features)
        items = sum(looked_up[name].values()[:, :8] for name in model.event_features)
        context = [looked_up[name].values()[:, :8] for name in model.contextual]
        assert isinstance(items, Tensor)
        sequence, _ = model.tokens(cut, items, context, cut.scored_B if model.uses_candidates else None)
        return sequence.values_TD[: model.tokens.contextual + 2 * history], sequence.contextual_len

    (before, prefix), (after, _) = tokens(history + 1), tokens(history + 5)
    assert torch.equal(before, after) == (lifetime == "user")
    assert (prefix > 0) == (lifetime == "request")


def test_reasons_are_named_together() -> None:
    model = ranker("request", "candidates", {**STU, "max_attn_len": 5, "min_full_attn_seq_len": 4})
    assert "model.place=request" in model.scope.reason and "min_full_attn_seq_len=4" in model.scope.reason
