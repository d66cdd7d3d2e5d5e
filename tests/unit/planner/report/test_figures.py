"""Figures of both reports: the schedule of a step, the straggler and its explanation, the verdict."""

from dataclasses import replace

import numpy as np
import pytest

from gr.planner.estimate import PHASES
from gr.planner.report.figures import examples_per_second, headline, schedule, straggler, verdict, words
from tests.support.estimates import estimate_of


def test_a_schedule_ends_with_the_step() -> None:
    estimated = estimate_of(8, 26)
    slowest_P = estimated.seconds_PR.max(axis=1)
    shown_P = slowest_P - estimated.hidden_P
    starts = [start for _, start in schedule(estimated)]
    assert starts[0] == 0
    np.testing.assert_allclose(np.diff(starts), shown_P[:-1])
    assert starts[-1] + shown_P[-1] == pytest.approx(estimated.step_seconds)


def test_where_hidden_parts_lie() -> None:
    estimated = estimate_of(8, 26)
    hidden = dict(zip(PHASES, schedule(estimated), strict=True))
    assert hidden["input_all_to_all"][0] == -estimated.hidden_P[0]
    after_backward = hidden["gradient_all_to_all"][1]
    assert hidden["gradient_all_reduce"][0] == pytest.approx(
        after_backward - estimated.hidden_P[PHASES.index("gradient_all_reduce")]
    )


def test_a_straggler_is_explained() -> None:
    estimated = estimate_of(8, 26)
    estimated.seconds_PR[PHASES.index("lookup"), 5] += 4e-3
    slowest = straggler(estimated)
    assert (slowest.rank, slowest.phase) == (5, "lookup")
    assert slowest.tables and all(5 in table.ranks for table in slowest.tables)
    assert [t.seconds for t in slowest.tables] == sorted((t.seconds for t in slowest.tables), reverse=True)
    text = slowest.explanation()
    assert text.startswith("Rank 5 has the most table work: ") and "It is furthest ahead in lookup: " in text
    assert f"Its costliest tables: {slowest.tables[0].name} (" in text


def test_even_work_and_none() -> None:
    estimated = estimate_of(8, 26)
    even = replace(estimated, seconds_PR=np.full_like(estimated.seconds_PR, 1e-3))
    assert straggler(even).explanation().endswith("0.0 % above the mean; table work is even.")
    free = replace(estimated, seconds_PR=np.zeros_like(estimated.seconds_PR))
    assert straggler(free).explanation() == "Tables cost nothing in this step."


def test_verdicts() -> None:
    assert verdict(estimate_of(8, 26)).startswith("Fits: the fullest, rank ")
    tight = estimate_of(8, 26, hbm_gb=56.0)
    over = int((tight.total_memory_R > 56e9).sum())
    assert verdict(tight).startswith(f"Does not fit: memory runs out on {over} of 8 ranks; rank ")
    host_R = np.zeros(8)
    host_R[3] = 200e9
    offloaded = replace(estimate_of(8, 26), host_R=host_R)
    expected = "Does not fit: host memory runs out on 1 of 8 ranks; rank 3 takes 200 GB of 192 GB."
    assert verdict(offloaded) == expected


def test_examples_are_those_of_the_global_batch() -> None:
    estimated = estimate_of(8, 26)
    assert examples_per_second(estimated) == pytest.approx(512 * 8 / estimated.step_seconds)
    inventory = estimated.plan.inventory.model_copy(update={"rank_batch_size": None, "global_batch_size": 1001})
    divided = replace(estimated, plan=replace(estimated.plan, inventory=inventory))
    assert examples_per_second(divided) == pytest.approx(1001 / estimated.step_seconds)


def test_headline_of_a_model_without_a_sequence_or_dense_part() -> None:
    estimated = replace(estimate_of(8, 26), tokens=0.0, flops=0.0)
    names = [name for name, _, _ in headline(estimated)]
    assert names == ["Parameters", "Step", "Examples", "Gap to the bound"]


def test_words() -> None:
    assert [words(name) for name in ("gradient_all_to_all", "gradient_all_reduce", "table_optimizer")] == [
        "gradient all-to-all",
        "gradient all-reduce",
        "table optimizer",
    ]
