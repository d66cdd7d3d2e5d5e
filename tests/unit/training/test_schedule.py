"""The rate's factor: warm-up, shape, end."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr.config.optim import ScheduleConfig
from gr.training.schedule import rate_factor

schedules = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["constant", "linear", "quadratic", "cosine"]),
    warmup_steps=st.integers(0, 20),
    hold_steps=st.integers(0, 20),
    final_fraction=st.floats(0, 1),
)


@given(schedules, st.integers(1, 60))
def test_every_schedule(config: ScheduleConfig, steps: int) -> None:
    factors = [rate_factor(config, step, steps) for step in range(steps)]
    assert all(0 < factor <= 1 + 1e-12 for factor in factors), "a factor of 0 would be a step for nothing"
    begin = config.warmup_steps + config.hold_steps
    warming, held, rest = factors[: config.warmup_steps], factors[config.warmup_steps : begin], factors[begin:]
    assert set(held) <= {1.0}
    assert warming == [(step + 1) / config.warmup_steps for step in range(len(warming))]
    if rest:
        assert rest[0] == pytest.approx(1.0)
        assert all(b <= a + 1e-12 for a, b in pairwise(rest))
        assert min(rest) >= (1.0 if config.kind == "constant" else config.final_fraction) - 1e-12
    if steps > begin and config.kind != "constant":
        assert rate_factor(config, steps, steps) == pytest.approx(config.final_fraction, abs=1e-12)


def test_by_hand() -> None:
    def factors(**fields: object) -> list[float]:
        config = ScheduleConfig(**fields)
        return [rate_factor(config, step, 6) for step in range(6)]

    assert factors() == [1.0] * 6
    assert factors(warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert factors(kind="linear", warmup_steps=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factors(kind="linear", warmup_steps=2, final_fraction=0.5)[3:] == [0.875, 0.75, 0.625]
    assert factors(kind="quadratic", warmup_steps=1, hold_steps=1) == [1.0, 1.0, 1.0, 0.5625, 0.25, 0.0625]
    half = 0.5 * math.sqrt(0.5)
    assert factors(kind="cosine", warmup_steps=2)[2:] == pytest.approx([1.0, 0.5 + half, 0.5, 0.5 - half])


def test_quadratic_is_the_published_policy_of_dlrm() -> None:
    """LRPolicyScheduler of facebookresearch/dlrm counts steps from 1 and decays to 1e-7 of its own accord."""
    warmup, start, decay = 5, 9, 20
    config = ScheduleConfig(kind="quadratic", warmup_steps=warmup, hold_steps=start - warmup - 1)
    for step in range(start + decay - 1):
        count = step + 1
        if count < warmup:
            published = 1.0 - (warmup - count) / warmup
        elif count < start:
            continue  # it stays at the last rate of the warm-up, here it is the peak
        else:
            published = ((decay - (count - start)) / decay) ** 2
        assert rate_factor(config, step, start + decay - 1) == pytest.approx(published)
