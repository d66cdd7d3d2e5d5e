"""gr compare: what run folders say side by side, and the paired test against values worked out elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from gr.cli import main
from gr.config import dump_config
from gr.errors import ConfigError, DataError
from gr.metrics import compare
from gr.metrics.compare import Run, common, paired, sign_flip_p, unpaired
from gr.metrics.retrieval import retrieval_metrics
from tests.support.tiny import tiny_config

Make = Callable[..., Run]
RANKS = np.array([1.0, 3.0, 20.0, 11.0, 2.0])


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run folder as training leaves it."""

    def write(name: str, ranks: np.ndarray | None = RANKS, *, report: dict | None = None, **sections: object) -> Run:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(dump_config(tiny_config("data", str(folder), **sections)))
        lines = [{"step": step, "kind": "train", "time": 0.0, "loss": 9.0 - step} for step in range(1, 5)]
        lines += [{"step": step, "kind": "validation", "time": 0.0, "hr@10": step / 8, "mrr": 0.5} for step in (0, 4)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if ranks is not None:
            np.save(folder / "test-ranks.npy", ranks)
            head = {"kind": "retrieval", "split": "test", "filter_seen": "all", "users": len(ranks), "step": 4}
            content = {**head, "evaluation_data": {"row_groups": 1, "schema": 2}, "model": retrieval_metrics(ranks)}
            (folder / "report.json").write_text(json.dumps(content | (report or {})))
        return Run.open(folder)

    return write


@pytest.mark.parametrize(("better", "worse"), [(30, 14), (5, 0), (7, 7)])
def test_p_of_hits_is_that_of_mcnemar(better: int, worse: int) -> None:
    differences = np.concatenate([np.ones(better), -np.ones(worse), np.zeros(100)])
    expected = binomtest(better, better + worse).pvalue
    assert sign_flip_p(differences) == pytest.approx(expected, rel=0.1, abs=0.01)


def test_p_of_no_difference_and_of_many_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sign_flip_p(np.zeros(9)) == 1.0
    differences = np.random.default_rng(1).normal(0.05, 1, 900)
    drawn = sign_flip_p(differences)
    monkeypatch.setattr(compare, "_NORMAL_FROM", 900)
    z = differences.sum() / np.sqrt((differences**2).sum())
    assert sign_flip_p(differences) == pytest.approx(2 * norm.sf(abs(z))) == pytest.approx(drawn, abs=0.02)


def test_paired_averages_the_runs_of_a_group() -> None:
    seeds, other = [RANKS, np.array([1.0, 30.0, 20.0, 1.0, 2.0])], [np.array([30.0, 3.0, 2.0, 11.0, 2.0])]
    hits, ndcg = paired(seeds, other)
    # HR@10 of the users: 1, .5, 0, .5, 1 and 0, 1, 1, 0, 1.
    expected = np.array([-1, 0.5, 1, -0.5, 0])
    assert (hits.name, ndcg.name) == ("hr@10", "ndcg@10") and hits.difference == pytest.approx(expected.mean())
    assert hits.error == pytest.approx(expected.std(ddof=1) / np.sqrt(5))


def test_metrics_of_tests_or_of_the_last_records(make: Make) -> None:
    done, again, running = make("a"), make("b", RANKS + 9), make("c", None)
    kind, values = common([done, again])
    assert kind == "test" and values["hr@10"] == [0.6, 0.2]  # ranks 10 and 11 of the five
    assert common([done, running]) == ("last validation", {"hr@10": [0.5, 0.5], "mrr": [0.5, 0.5]})
    assert running.curve("train", "loss") == [(1, 8.0), (2, 7.0), (3, 6.0), (4, 5.0)]


@pytest.mark.parametrize(
    ("ranks", "report", "reason"),
    [
        (None, None, r"has no metrics by user \(test-ranks.npy\): only finished retrieval runs have"),
        (RANKS[:4], None, "users differs: 5 and 4"),
        (RANKS, {"filter_seen": "none"}, "filter_seen differs: all and none"),
        (RANKS, {"evaluation_data": {"row_groups": 1, "schema": 3}}, r"evaluation_data differs \(report.json\)"),
        (RANKS, {"evaluation_data": None}, "evaluation_data differs"),
    ],
)
def test_other_users_are_not_paired(make: Make, ranks: np.ndarray | None, report: dict | None, reason: str) -> None:
    first, second = make("a"), make("b", ranks, report=report)
    assert unpaired(first, make("same")) is None
    import re

    assert re.search(reason, unpaired(first, second) or "")


def test_folders_that_are_no_runs(make: Make, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="is no run folder"):
            Run.open(path)
    folder = make("a").path
    (folder / "test-ranks.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"test-ranks\.npy: is not the ranks of users"):
        _ = Run.open(folder).ranks
    for content in ("{", "5", '{"model": 3}', "[" * 9999):
        (folder / "report.json").write_text(content)
        with pytest.raises(DataError, match=r"report\.json: (cannot be read|is not)"):
            Run.open(folder)


def test_a_line_that_a_kill_cut_off_is_left_out(make: Make) -> None:
    folder = make("a", None).path
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('3\n{"step": 9, "kind"')
    assert len(Run.open(folder).records) == 6


def test_command(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make("a"), make("b", RANKS + 9, seed=5)
    assert main(["compare", str(a.path), str(b.path)]) == 0
    out = capsys.readouterr().out
    assert "configuration, A -> B\n  seed: 1 -> 5\n" in out and "run_dir" not in out.split("configuration")[1]
    row = next(line for line in out.splitlines() if line.startswith("  hr@10 "))
    assert row.split() == ["hr@10", "0.6", "0.2", "-0.4"]
    assert "\n\npaired, B - A, 5 users" in out and "  hr@10    -0.4000 +- 0.2449  p " in out
    assert main(["compare", str(a.path)]) == 2 and main(["compare", str(a.path), str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


@pytest.mark.slow
def test_picture(make: Make, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    runs = [str(make(name, ranks).path) for name, ranks in (("a", RANKS), ("b", None))]
    assert main(["compare", *runs, "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
