"""A ranking run on 1, 2 and 4 gloo ranks trains as the published equations do in one plain PyTorch process.

The global batch is the same at every world size. The plain process is tests/support/dlrm_reference.py with PyTorch's
optimizers and the run's initial values; it reads the Parquet files by itself.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gr.checkpoint import CheckpointFolder
from gr.config.click import ClickConfig
from gr.config.dlrm import ROW_MULTIPLE
from gr.dist import World
from gr.embeddings.init import key_of, uniform
from gr.experiment import evaluate, train
from gr.metrics.ranking import RankingMetrics
from gr.models import build_model
from gr.models.convert.facebook_dlrm import to_facebook
from gr.models.dense import initialise_dense
from gr.schema import TabularSchema
from tests.support.dlrm_reference import ReferenceDLRM, Shape
from tests.support.ranks import RankError, run_ranks
from tests.support.tiny_tabular import COLUMNS, DENSE, tiny_click_config, write_tiny_tabular

STEPS, HALF = 12, 6
LOSS = 2e-5  # absolute; losses are 0.4 to 0.8 nats
PLANS = ("table_wise", "row_wise", "column_wise", "data_parallel")
RATES = {"sgd": 0.3, "adagrad": 0.05}
DENSE_RATES = {"adamw": 0.01, "adagrad": 0.05, "sgd": 0.2}
SIZES, FEWEST_AND_MOST = (1, 2, 4), (1, 4)
EXACT = ("examples", "base_rate")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows to train on, and three folders to evaluate on, by what their last batch of 32 leaves to four ranks."""
    folder = tmp_path_factory.mktemp("data")
    write_tiny_tabular(folder / "train")
    for name, rows in {"one": 97, "five": 101, "even": 128}.items():
        write_tiny_tabular(folder / name, rows=rows, seed=1)
    return folder


def configured(
    data: Path,
    run_dir: Path,
    sharding: str,
    optimizer: str = "adagrad",
    *,
    row_weights: bool = False,
    dense: str = "adamw",
) -> ClickConfig:
    return tiny_click_config(
        data / "train",
        run_dir,
        model={"row_weights": row_weights},
        planner={"sharding": sharding, "allow_state_per_shard": True},
        embeddings={"optimizer": {"kind": optimizer, "lr": RATES[optimizer]}},
        optimizer={"kind": dense, "lr": DENSE_RATES[dense]},
        evaluation={"path": str(data / "five")},
        checkpoint={"every": HALF, "keep_last": 9},
    )


def evaluated_on(config: ClickConfig, path: Path) -> ClickConfig:
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"path": str(path)})})


def run(world: World, *configs: ClickConfig) -> list[Any]:
    return [train(config, world) for config in configs]


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def assert_near(metrics: dict[str, float], expected: dict[str, float], within: float = LOSS) -> None:
    assert {name: metrics[name] for name in EXACT} == {name: expected[name] for name in EXACT}
    assert metrics == pytest.approx(expected, abs=within)


class Plain:
    """The same run without gr's data, model, tables and trainer."""

    def __init__(self, config: ClickConfig) -> None:
        self.config = config
        schema = TabularSchema.load(config.data.path)
        model = build_model(config, schema)
        model.to_empty(device="cpu")
        initialise_dense(model, config.seed)
        rows = tuple(column.cardinality for column in schema.sparse)
        dlrm = config.model
        stored = dlrm.dim + (ROW_MULTIPLE if dlrm.row_weights else 0)
        shape = Shape(rows, len(DENSE), dlrm.dim, dlrm.bottom, dlrm.top, "dot", row_weights=dlrm.row_weights)
        self.model = ReferenceDLRM(shape)
        unweighted = build_model(
            config.model_copy(update={"model": dlrm.model_copy(update={"row_weights": False})}), schema
        )
        dense_weights = {name: p for name, p in model.state_dict().items() if not name.startswith("tables.")}
        with torch.no_grad():
            for column in schema.sparse:
                counters = torch.arange(column.cardinality * stored).view(column.cardinality, -1)
                drawn = uniform(counters, key_of(config.seed, column.name), column.cardinality**-0.5)
                dense_weights[f"tables.embedding_bags.{column.name}.weight"] = drawn[:, : dlrm.dim].float()
        published = to_facebook(dense_weights, unweighted)
        self.model.load_state_dict(published, strict=not dlrm.row_weights)  # row weights start at one
        tables = [*self.model.emb_l.parameters(), *(self.model.v_W_l if dlrm.row_weights else ())]
        dense = [*self.model.bot_l.parameters(), *self.model.top_l.parameters()]
        kind, lr = config.embeddings.optimizer.kind, config.embeddings.optimizer.lr
        self.optimizers: list[torch.optim.Optimizer] = [
            plain_optimizer(config.optimizer.kind, dense, config.optimizer.lr),
            torch.optim.SGD(tables, lr=lr) if kind == "sgd" else torch.optim.Adagrad(tables, lr=lr, eps=1e-8),
        ]

    def train(self) -> list[float]:
        rows, size = read(self.config.data.path), self.config.trainer.global_batch_size
        found = []
        for step in range(self.config.trainer.steps):
            batch = rows.slice(step * size, size)
            loss = F.binary_cross_entropy(self.scored(batch), labels_of(batch))
            found.append(float(loss.detach()))
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return found

    @torch.no_grad()
    def metrics(self, path: Path) -> dict[str, float]:
        alone = World(0, 1, 0, 1, torch.device("cpu"))
        metrics, rows = RankingMetrics("plain", alone, predictions="probabilities"), read(path)
        metrics.update(self.scored(rows), labels_of(rows))
        return metrics.compute()

    def scored(self, rows: pa.Table) -> Tensor:
        dense = torch.stack([torch.tensor(rows[name].to_pylist()) for name in DENSE], dim=1)
        lists = [(rows[column.name].to_pylist(), column.hots) for column in COLUMNS]
        bags = [[[ids] if hots == 1 else ids for ids in examples] for examples, hots in lists]
        return self.model(dense, bags)


def plain_optimizer(kind: str, parameters: list, lr: float) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    return torch.optim.SGD(parameters, lr=lr) if kind == "sgd" else torch.optim.Adagrad(parameters, lr=lr, eps=1e-8)


def read(folder: Path | str) -> pa.Table:
    return pa.concat_tables(pq.read_table(part) for part in sorted(Path(folder).glob("part-*.parquet")))


def labels_of(rows: pa.Table) -> Tensor:
    return torch.tensor(rows["label"].to_pylist())


@pytest.fixture(scope="module")
def plain(data):
    @cache
    def trained(optimizer: str, **settings: Any) -> tuple[Plain, list[float]]:
        one = Plain(configured(data, data / "unused", "auto", optimizer, **settings))
        return one, one.train()

    return trained


@pytest.mark.parametrize("size", FEWEST_AND_MOST)
@pytest.mark.parametrize("sharding", PLANS)
def test_losses_and_metrics_are_those_of_the_published_equations(data, tmp_path, plain, sharding, size):
    configs = [configured(data, tmp_path / optimizer, sharding, optimizer) for optimizer in RATES]
    reports = run_ranks(run, size, *configs)[0]
    for optimizer, report in zip(RATES, reports, strict=True):
        reference, expected = plain(optimizer)
        got = losses(tmp_path / optimizer)
        assert list(got) == list(range(1, STEPS + 1))
        assert list(got.values()) == pytest.approx(expected, abs=LOSS), optimizer
        assert_near(report["model"], reference.metrics(data / "five"))
        assert report["training_data"] == {"dropped_examples": 293 - STEPS * 24}


@pytest.mark.parametrize("size", FEWEST_AND_MOST)
@pytest.mark.parametrize(
    ("sharding", "optimizer"),
    [("table_wise", "sgd"), ("row_wise", "adagrad"), ("column_wise", "adagrad"), ("data_parallel", "sgd")],
)
def test_row_weights_train_as_the_published_ones(data, tmp_path, plain, sharding, optimizer, size):
    """facebookresearch/dlrm --weighted-pooling learned."""
    config = configured(data, tmp_path / "run", sharding, optimizer, row_weights=True)
    (report,) = run_ranks(run, size, config)[0]
    reference, expected = plain(optimizer, row_weights=True)
    got = list(losses(tmp_path / "run").values())
    assert got == pytest.approx(expected, abs=LOSS)
    assert got != pytest.approx(plain(optimizer)[1], abs=10 * LOSS), "the weights made no difference"
    assert_near(report["model"], reference.metrics(data / "five"))


def test_what_is_compared_has_learnt(data, plain):
    """So that equality is not that of models which stood still, and a gradient of twice the size would be seen."""
    for optimizer, rate in RATES.items():
        config = configured(data, data / "unused", "auto", optimizer)
        untrained, trained = Plain(config).metrics(data / "five"), plain(optimizer)[0].metrics(data / "five")
        assert trained["log_loss"] < untrained["log_loss"] - 0.1, (optimizer, trained, untrained)
        faster = {"kind": optimizer, "lr": 2 * rate}
        twice = Plain(tiny_click_config(data / "train", data / "unused", embeddings={"optimizer": faster})).train()
        assert max(abs(a - b) for a, b in zip(twice, plain(optimizer)[1], strict=True)) > 50 * LOSS, optimizer


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory) -> dict[int, Path]:
    """Run folders of whole runs, by world size."""
    folders = {size: tmp_path_factory.mktemp("runs") / str(size) for size in (1, 2)}
    for size, folder in folders.items():
        run_ranks(run, size, configured(data, folder, "row_wise"))
    return folders


def resumed_from_half(full: Path, run_dir: Path) -> Path:
    """A run folder as it was after HALF steps."""
    name = CheckpointFolder(full / "checkpoints").final(HALF).name
    shutil.copytree(full / "checkpoints" / name, run_dir / "checkpoints" / name)
    return run_dir


@pytest.mark.parametrize("size", [1, 2])
def test_a_resumed_run_repeats_the_uninterrupted_one_bitwise(data, tmp_path, saved, size):
    part = resumed_from_half(saved[size], tmp_path / "part")
    (again,) = run_ranks(run, size, configured(data, part, "row_wise"))[0]
    assert losses(part) == {step: loss for step, loss in losses(saved[size]).items() if step > HALF}
    assert again["model"] == json.loads((saved[size] / "report.json").read_text())["model"]


@pytest.mark.parametrize("size", SIZES)
def test_dense_optimizers_step_as_pytorch_s_do_and_resume_bitwise(data, tmp_path, plain, size):
    kinds = ("adagrad", "sgd")
    configs = [configured(data, tmp_path / kind, "row_wise", dense=kind) for kind in kinds]
    reports = run_ranks(run, size, *configs)[0]
    parts = [resumed_from_half(tmp_path / kind, tmp_path / f"{kind}-part") for kind in kinds]
    configs = [configured(data, part, "row_wise", dense=kind) for kind, part in zip(kinds, parts, strict=True)]
    resumed = run_ranks(run, size, *configs)[0]
    for kind, part, report, again in zip(kinds, parts, reports, resumed, strict=True):
        whole = losses(tmp_path / kind)
        assert list(whole.values()) == pytest.approx(plain("adagrad", dense=kind)[1], abs=LOSS), kind
        if size == 4:  # the sum over four ranks is not the same bits each time
            assert losses(part)[STEPS] == pytest.approx(whole[STEPS], abs=LOSS), kind
            continue
        assert losses(part) == {step: loss for step, loss in whole.items() if step > HALF}, kind
        assert again["model"] == report["model"], kind


def test_another_dense_optimizer_does_not_resume(data, tmp_path, saved):
    """Neither without the states it needs nor by dropping those there are."""
    for kind in ("adagrad", "sgd"):
        part = resumed_from_half(saved[1], tmp_path / kind)
        with pytest.raises(RankError, match=r"is of another model: dense_optimizer bottom.0.weight.*: the"):
            run_ranks(run, 1, configured(data, part, "row_wise", dense=kind))


@pytest.mark.parametrize(("size", "sharding"), [(1, "row_wise"), (4, "row_wise"), (4, "column_wise")])
def test_another_world_size_or_plan_continues_the_loss_curve(data, tmp_path, saved, size, sharding):
    part = resumed_from_half(saved[2], tmp_path / "part")
    (report,) = run_ranks(run, size, configured(data, part, sharding))[0]
    before, after = losses(saved[2]), losses(part)
    assert list(after) == list(range(HALF + 1, STEPS + 1))
    assert after == pytest.approx({step: before[step] for step in after}, abs=LOSS)
    assert_near(report["model"], json.loads((saved[2] / "report.json").read_text())["model"])


def evaluated(world: World, checkpoint: Path, *configs: ClickConfig) -> list[dict]:
    return [evaluate(config, checkpoint, world, "test")["model"] for config in configs]


def test_evaluation_is_equal_on_1_2_and_4_ranks_whatever_the_last_batch(data, saved, plain):
    """Of 97 rows the last batch has one, so that three of four ranks have none; of 101 it has five."""
    checkpoint = CheckpointFolder(saved[2] / "checkpoints").final(STEPS)
    config = configured(data, saved[2], "row_wise")
    folders = {"one": 97, "five": 101, "even": 128}
    by_size = [
        run_ranks(evaluated, size, checkpoint, *(evaluated_on(config, data / name) for name in folders))[0]
        for size in SIZES
    ]
    for number, (name, rows) in enumerate(folders.items()):
        alone = by_size[0][number]
        assert alone["examples"] == rows
        assert_near(alone, plain("adagrad")[0].metrics(data / name))
        for others in by_size[1:]:
            assert_near(others[number], alone, within=1e-6)
