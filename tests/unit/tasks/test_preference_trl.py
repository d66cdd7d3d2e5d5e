"""The losses of pairs against those of TRL, whose trainers have them as methods: each is called on a stub of itself.

TRL has no loss of S-DPO: with one rejected item it is DPO, which test_preference.py compares too.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from gr.config.preference import DPOLoss, RewardLoss, SDPOLoss
from gr.tasks import preference_loss
from gr.tasks.preference import margin_of

pytestmark = pytest.mark.slow  # TRL takes ten seconds to import
P, CLOSE = 16, 1e-6
BETA = 0.3


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="TRL is not installed (pip install trl==1.16.0)")


class Accelerator:
    """One process: what it gathers is its own."""

    device = torch.device("cpu")

    @staticmethod
    def gather(x: torch.Tensor) -> torch.Tensor:
        return x

    gather_for_metrics = gather


def trainer(**fields: object) -> SimpleNamespace:
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=Accelerator(),
        args=SimpleNamespace(center_rewards_coefficient=None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        **fields,
    )


@pytest.fixture
def compared() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of a chosen and a rejected item under the model and under the reference, float64 [P, 2]; gaps [P, 1]."""
    generator = torch.Generator().manual_seed(0)
    own, reference = torch.randn(2, P, 2, generator=generator, dtype=torch.float64) * 3
    return own.requires_grad_(), reference, torch.randint(1, 6, (P, 1), generator=generator)


def assert_equal(own_P2: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The mean losses and their gradients."""
    gradients = [torch.autograd.grad(loss, own_P2, retain_graph=True)[0] for loss in (ours, theirs)]
    assert abs(float(ours - theirs)) <= CLOSE
    assert gradients[0].abs().max() > 1e-3
    assert (gradients[0] - gradients[1]).abs().max() <= CLOSE


def test_reward_with_a_margin(trl, compared):
    own_P2, reference_P2, gap_P1 = compared
    loss = RewardLoss()
    inputs = {"margin": margin_of(gap_P1, loss.margins)[:, 0], "attention_mask": torch.ones(2 * P, 1)}
    # Of a batch, chosen items come first.
    model = lambda **_: SimpleNamespace(logits=own_P2.T.reshape(2 * P, 1))  # noqa: E731
    theirs = trl.RewardTrainer.compute_loss(trainer(), model, inputs)
    assert_equal(own_P2, preference_loss(own_P2, reference_P2, gap_P1, loss).mean(), theirs)


@pytest.mark.parametrize("loss", [DPOLoss(beta=BETA), SDPOLoss(beta=BETA)], ids=["dpo", "sdpo"])
def test_dpo_and_sdpo_of_one_rejected_item(trl, compared, loss):
    """An item is a completion of one token after a prompt of one."""
    own_P2, reference_P2, gap_P1 = compared
    one = torch.ones(2 * P, 1)
    outputs = SimpleNamespace(
        log_probs=own_P2.T.reshape(2 * P, 1), entropy=0 * one, mean_logits=0 * one, is_top1=one.bool()
    )
    inputs = {
        "input_ids": torch.zeros(2 * P, 2, dtype=torch.int64),
        "attention_mask": torch.ones(2 * P, 2),
        "completion_mask": torch.tensor([[0, 1]]).expand(2 * P, 2),
        "ref_chosen_logps": reference_P2[:, 0],
        "ref_rejected_logps": reference_P2[:, 1],
    }
    stub = trainer(
        beta=BETA,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        use_weighting=False,
        ld_alpha=None,
    )
    theirs = trl.DPOTrainer._compute_loss(stub, lambda **_: outputs, inputs, False)
    assert_equal(own_P2, preference_loss(own_P2, reference_P2, gap_P1, loss).mean(), theirs)
