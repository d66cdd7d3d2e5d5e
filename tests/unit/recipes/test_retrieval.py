"""The last line of a retrieval report."""

from typing import Any

from gr.recipes.retrieval import RetrievalRecipe


def report(**baselines: tuple[float, float]) -> dict[str, Any]:
    metrics = {name: {"hr@10": hit, "ndcg@10": gain} for name, (hit, gain) in baselines.items()}
    return {"users": 10_000, "model": metrics.pop("model"), "baselines": metrics}


def test_it_names_the_baseline_that_is_furthest_above() -> None:
    line = RetrievalRecipe.verdict(report(model=(0.06, 0.03), ease=(0.09, 0.05), markov=(0.07, 0.05)))
    assert line is not None and line.startswith(
        "below a baseline: ease has hr@10 0.0900, the model 0.0600 (one standard error is 0.0029 at most); "
    )
    line = RetrievalRecipe.verdict(report(model=(0.06, 0.03), markov=(0.05, 0.04)))
    assert line is not None and "markov has ndcg@10 0.0400, the model 0.0300" in line


def test_nothing_is_said_where_the_model_is_above() -> None:
    assert RetrievalRecipe.verdict(report(model=(0.06, 0.03), markov=(0.06, 0.03), popularity=(0.0, 0.0))) is None
    assert RetrievalRecipe.verdict(report(model=(0.06, 0.03))) is None
