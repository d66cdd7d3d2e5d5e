"""The type of each table's rows and of each dense layer: the fewest bytes with which the accuracy gate still passes.

What rounding costs is measured part by part. Roundings of different parts are independent, so their divergences add
up, and the choice is a knapsack: of all steps to fewer bytes, those with the least divergence per byte saved come
first. That makes one path from the most bytes to the fewest; the gate is asked on it for whole choices, by bisection,
so what is chosen was measured as a whole. The path knows no labels: of many choices that were tried against the
labels, the best would have passed by luck.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

from pydantic import BaseModel, ConfigDict
from torch import nn

from gr.config.export import Kind, RowKind
from gr.embeddings import table_weights
from gr.errors import ServingError, nearest
from gr.logging import get_logger
from gr.serving.gate.accuracy_gate import GateReport, Limits, Verdict
from gr.serving.gate.calibration import Calibration
from gr.serving.gate.dense_layers import dense_layers, in_bf16, layer_bytes
from gr.serving.tables.quantize import bytes_of, clipped, has_kind, round_trip

log = get_logger(__name__)


class Sensitivity(BaseModel):
    """The effect of one type of one table or dense layer, all others being as trained.

    sensitivity: the divergence relative to the loss, summed over tasks. change, error: of the first measure of the
    first task. clipped: values outside the range of fp16.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: str
    kind: Kind
    bytes: int
    sensitivity: float
    measure: str
    change: float
    error: float
    verdict: Verdict
    clipped: int


class DtypeChoice(BaseModel):
    """The type of each table's rows and of each dense layer, and the gate's report on all of them together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kinds: dict[str, Kind]
    bytes: int
    fp32_bytes: int
    sensitivities: tuple[Sensitivity, ...]
    gate: GateReport


class Step(NamedTuple):
    """A table or dense layer in fewer bytes. slope: sensitivity added per byte saved."""

    slope: float
    part: str
    kind: Kind


@contextmanager
def rounded(model: nn.Module, kinds: Mapping[str, Kind]) -> Iterator[None]:
    """The model with tables and dense layers of these types; the trained values are back at the end.

    Raises ServingError for a part that the model does not have, and as quantize.pack does.
    """
    weights, layers = table_weights(model), dense_layers(model)
    if unknown := [name for name in kinds if name not in weights and name not in layers]:
        raise ServingError(f"the model has no table {unknown[0]}: {nearest(unknown[0], weights, 'tables')}")
    rows = {name: cast(RowKind, kind) for name, kind in kinds.items() if name in weights and kind != "fp32"}
    trained = {name: weights[name].detach().clone() for name in rows}
    try:
        for name, values in trained.items():
            weights[name].data.copy_(round_trip(values, rows[name]))
        with in_bf16(layers[name] for name, kind in kinds.items() if kind == "bf16"):
            yield
    finally:
        for name, values in trained.items():
            weights[name].data.copy_(values)


def bytes_by_part(model: nn.Module, kinds: Mapping[str, Kind]) -> dict[str, int]:
    """Bytes of tables and dense layers of these types."""
    weights, layers = table_weights(model), dense_layers(model)
    rows = {name: cast(RowKind, kind) for name, kind in kinds.items() if name in weights}
    tables = {name: bytes_of(len(weights[name]), weights[name].shape[1], kind) for name, kind in rows.items()}
    return tables | {name: layer_bytes(layers[name], kind) for name, kind in kinds.items() if name in layers}


def measure(calibration: Calibration, kinds: Mapping[str, Kind], limits: Limits) -> GateReport:
    """The gate's report on the model with parts of these types."""
    model = calibration.saved.model
    with rounded(model, kinds):
        candidate = calibration.predict(model)
    return calibration.gate(candidate, limits)


def sensitivities(calibration: Calibration, limits: Limits, options: Mapping[str, Sequence[Kind]]) -> list[Sensitivity]:
    """The sensitivity of each part to each of its options but the first; of a table, to those that its width has."""
    model, measured = calibration.saved.model, []
    weights = table_weights(model)
    for part, kinds in options.items():
        weight = weights.get(part)
        for kind in kinds[1:]:
            if weight is not None and not has_kind(weight.shape[1], cast(RowKind, kind)):
                continue
            report = measure(calibration, {part: kind}, limits)
            first = report.tasks[0].measures[0]
            measured.append(
                Sensitivity(
                    part=part,
                    kind=kind,
                    bytes=bytes_by_part(model, {part: kind})[part],
                    sensitivity=report.sensitivity,
                    measure=first.name,
                    change=first.change,
                    error=first.error,
                    verdict=report.verdict,
                    clipped=0 if weight is None else clipped(weight.detach(), cast(RowKind, kind)),
                )
            )
    return measured


def choose(calibration: Calibration, limits: Limits, options: Mapping[str, Sequence[Kind]]) -> DtypeChoice:
    """The cheapest types with which the gate passes. options: of each table and dense layer, the most bytes first.

    Raises ServingError where the gate does not pass with the first of all.
    """
    model = calibration.saved.model
    measured = sensitivities(calibration, limits, options)
    most = {part: kinds[0] for part, kinds in options.items()}
    bytes_of_most = bytes_by_part(model, most)
    steps = steps_to_fewer_bytes(measured, bytes_of_most)
    reports = {0: measure(calibration, most, limits)}
    reports[0].require()

    def passes(count: int) -> bool:
        reports[count] = measure(calibration, taken(steps[:count], most), limits)
        return reports[count].verdict == "pass"

    low, high = 0, len(steps) + 1  # the first `low` steps pass, the first `high` do not, or are more than there are
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    chosen = taken(steps[:low], most)
    if not low:
        log.warning("nothing passes the accuracy gate in fewer bits: all stays as it is (%s)", calibration.data)
    return DtypeChoice(
        kinds=chosen,
        bytes=sum(bytes_by_part(model, chosen).values()),
        fp32_bytes=sum(bytes_by_part(model, dict.fromkeys(options, "fp32")).values()),
        sensitivities=tuple(measured),
        gate=reports[low],
    )


def taken(steps: Sequence[Step], most: Mapping[str, Kind]) -> dict[str, Kind]:
    """The type of each part after these steps from those of the most bytes."""
    return {**most, **{step.part: step.kind for step in steps}}


def steps_to_fewer_bytes(measured: Sequence[Sensitivity], most_bytes: Mapping[str, int]) -> list[Step]:
    """The steps of all parts, those with the least sensitivity added per byte saved first. most_bytes: of each part.

    A part's own steps are the lower convex hull of its types, so they come in order, and every prefix is the best
    choice of its bytes as far as sensitivities add up (the linear relaxation of the knapsack).
    """
    steps = []
    for part, size in most_bytes.items():
        current: tuple[Kind | None, int, float] = (None, size, 0.0)
        options = [(each.kind, each.bytes, each.sensitivity) for each in measured if each.part == part]
        while cheaper := [option for option in options if option[1] < current[1]]:
            slopes = [(option[2] - current[2]) / (current[1] - option[1]) for option in cheaper]
            # Of equal slopes the one to the fewest bytes.
            slope, _, best = min(
                zip(slopes, (option[1] for option in cheaper), cheaper, strict=True), key=lambda each: each[:2]
            )
            steps.append(Step(slope, part, best[0]))
            current = best
    return sorted(steps, key=lambda step: step.slope)
