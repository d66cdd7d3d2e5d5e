"""The kind of rows of each table: the fewest bytes with which the accuracy gate still passes.

What rounding costs is measured table by table. Roundings of different tables are independent, so their divergences add
up, and the choice is a knapsack: of all steps to fewer bytes, those with the least divergence per byte saved come
first. That makes one path from fp32 to the fewest bytes; the gate is asked on it for whole choices, by bisection, so
what is chosen was measured as a whole. The path knows no labels: of many choices that were tried against the labels,
the best would have passed by luck.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict
from torch import nn

from gr.embeddings import table_weights
from gr.errors import ServingError, nearest
from gr.logging import get_logger
from gr.serving.gate.accuracy_gate import GateReport, Limits, Verdict
from gr.serving.gate.calibration import Calibration
from gr.serving.tables.quantize import ROW_KINDS, RowKind, bytes_of, clipped, has_kind, round_trip

log = get_logger(__name__)


class Sensitivity(BaseModel):
    """The effect of one kind of rows of one table, all other tables being as trained.

    sensitivity: the divergence relative to the loss, summed over tasks. change, error: of the first measure of the
    first task. clipped: values outside the range of fp16.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str
    kind: RowKind
    bytes: int
    sensitivity: float
    measure: str
    change: float
    error: float
    verdict: Verdict
    clipped: int


class DtypeChoice(BaseModel):
    """The kind of rows of each table, and the gate's report on all of them together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tables: dict[str, RowKind]
    bytes: int
    fp32_bytes: int
    sensitivities: tuple[Sensitivity, ...]
    gate: GateReport


class Step(NamedTuple):
    """A table's rows in fewer bytes. slope: sensitivity added per byte saved."""

    slope: float
    table: str
    kind: RowKind


@contextmanager
def rounded(model: nn.Module, kinds: Mapping[str, RowKind]) -> Iterator[None]:
    """The model with the values that rows of these kinds keep of its tables; the trained values are back at the end.

    Raises ServingError for a table that the model does not have, and as quantize.pack does.
    """
    weights = table_weights(model)
    if unknown := [name for name in kinds if name not in weights]:
        raise ServingError(f"the model has no table {unknown[0]}: {nearest(unknown[0], weights, 'tables')}")
    trained = {name: weights[name].detach().clone() for name, kind in kinds.items() if kind != "fp32"}
    try:
        for name, values in trained.items():
            weights[name].data.copy_(round_trip(values, kinds[name]))
        yield
    finally:
        for name, values in trained.items():
            weights[name].data.copy_(values)


def table_bytes(model: nn.Module, kinds: Mapping[str, RowKind]) -> int:
    """Bytes of all rows. kinds: of each table."""
    return sum(bytes_of(len(weight), weight.shape[1], kinds[name]) for name, weight in table_weights(model).items())


def measure(calibration: Calibration, kinds: Mapping[str, RowKind], limits: Limits) -> GateReport:
    """The gate's report on the model with rows of these kinds."""
    model = calibration.saved.model
    with rounded(model, kinds):
        candidate = calibration.predict(model)
    return calibration.gate(candidate, limits)


def sensitivities(calibration: Calibration, limits: Limits, kinds: Sequence[RowKind] = ROW_KINDS) -> list[Sensitivity]:
    """The sensitivity of each table to each kind that its width can have, but fp32, table by table."""
    measured = []
    for table, weight in table_weights(calibration.saved.model).items():
        for kind in kinds:
            if kind == "fp32" or not has_kind(weight.shape[1], kind):
                continue
            report = measure(calibration, {table: kind}, limits)
            first = report.tasks[0].measures[0]
            measured.append(
                Sensitivity(
                    table=table,
                    kind=kind,
                    bytes=bytes_of(len(weight), weight.shape[1], kind),
                    sensitivity=report.sensitivity,
                    measure=first.name,
                    change=first.change,
                    error=first.error,
                    verdict=report.verdict,
                    clipped=clipped(weight.detach(), kind),
                )
            )
    return measured


def choose(calibration: Calibration, limits: Limits, kinds: Sequence[RowKind] = ROW_KINDS) -> DtypeChoice:
    """The cheapest kinds of rows, of those named, with which the gate passes; fp32 where none but it does."""
    model = calibration.saved.model
    measured = sensitivities(calibration, limits, kinds)
    fp32_bytes = {name: 4 * weight.numel() for name, weight in table_weights(model).items()}
    steps = steps_to_fewer_bytes(measured, fp32_bytes)
    reports: dict[int, GateReport] = {}

    def passes(count: int) -> bool:
        reports[count] = measure(calibration, taken(steps[:count], fp32_bytes), limits)
        return reports[count].verdict == "pass"

    low, high = 0, len(steps) + 1  # the first `low` steps pass, the first `high` do not, or are more than there are
    if not passes(0):
        raise AssertionError("a model answers as it does itself")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    chosen = taken(steps[:low], fp32_bytes)
    total = table_bytes(model, chosen)
    if not low:
        log.warning("no table passes the accuracy gate in fewer bits: all stay fp32 (%s)", calibration.data)
    return DtypeChoice(
        tables=chosen,
        bytes=total,
        fp32_bytes=sum(fp32_bytes.values()),
        sensitivities=tuple(measured),
        gate=reports[low],
    )


def taken(steps: Sequence[Step], tables: Mapping[str, int]) -> dict[str, RowKind]:
    """The kind of each table after these steps from fp32."""
    kinds: dict[str, RowKind] = dict.fromkeys(tables, "fp32")
    return kinds | {step.table: step.kind for step in steps}


def steps_to_fewer_bytes(measured: Sequence[Sensitivity], fp32_bytes: Mapping[str, int]) -> list[Step]:
    """The steps of all tables, those with the least sensitivity added per byte saved first.

    A table's own steps are the lower convex hull of its kinds, so they come in order, and every prefix is the best
    choice of its bytes as far as sensitivities add up (the linear relaxation of the knapsack).
    """
    steps = []
    for table, size in fp32_bytes.items():
        current: tuple[RowKind, int, float] = ("fp32", size, 0.0)
        options = [(each.kind, each.bytes, each.sensitivity) for each in measured if each.table == table]
        while cheaper := [option for option in options if option[1] < current[1]]:
            slopes = [(option[2] - current[2]) / (current[1] - option[1]) for option in cheaper]
            # Of equal slopes the one to the fewest bytes.
            slope, _, best = min(
                zip(slopes, (option[1] for option in cheaper), cheaper, strict=True), key=lambda each: each[:2]
            )
            steps.append(Step(slope, table, best[0]))
            current = best
    return sorted(steps, key=lambda step: step.slope)
