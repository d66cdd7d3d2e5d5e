"""Where two forms of a model differ: the outputs of every layer, side by side, in the order of the computation."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedTensor

from gr.checkpoint import resolve
from gr.checkpoint.layout import CONFIG
from gr.config import load_config
from gr.config.export import Kind
from gr.embeddings import table_weights
from gr.errors import ServingError
from gr.models.saved import load
from gr.serving.gate.calibration import calibration
from gr.serving.gate.dense_layers import dense_layers
from gr.serving.gate.dtypes import rounded
from gr.serving.package.layout import read_current, read_manifest
from gr.serving.passes.build import served_kind

Forward = Callable[[nn.Module, Any], object]


@dataclass(frozen=True)
class LayerDifference:
    """The outputs of one layer over all batches.

    layer: the module's name, with its tensor where it gives several, and with # and the number of the call from its
    second call on. kind: the class of the module. signal: the root mean square of the reference's outputs.
    largest: the largest absolute difference. snr: signal over the root mean square of the differences, in decibels;
    infinite where there is none.
    """

    layer: str
    kind: str
    values: int
    signal: float
    largest: float
    snr: float

    @property
    def differs(self) -> bool:
        return self.snr < math.inf


class _Sums:
    """Sums over the batches of one layer."""

    def __init__(self, kind: str) -> None:
        self.kind, self.values = kind, 0
        self.square = self.error = self.largest = 0.0

    def add(self, reference: Tensor, candidate: Tensor) -> None:
        reference, candidate = reference.detach().double(), candidate.detach().double()
        # Where both are infinite or NaN they are alike.
        alike = (reference == candidate) | (reference.isnan() & candidate.isnan())
        difference = torch.where(alike, 0.0, (reference - candidate).abs().nan_to_num(nan=math.inf))
        self.values += reference.numel()
        self.square += float(reference.square().sum())
        self.error += float(difference.square().sum())
        self.largest = max(self.largest, float(difference.amax()) if difference.numel() else 0.0)

    def difference(self, layer: str) -> LayerDifference:
        if not self.error:
            snr = math.inf
        elif not self.square or math.isinf(self.error):
            snr = -math.inf
        else:
            snr = 10 * math.log10(self.square / self.error)
        signal = math.sqrt(self.square / max(self.values, 1))
        return LayerDifference(layer, self.kind, self.values, signal, self.largest, snr)


def rounded_layers(
    checkpoint: str | Path,
    kinds: Mapping[str, Kind] | Kind,
    *,
    rows: int,
    data: str | Path | None = None,
    plugins: Collection[str] = (),
) -> list[LayerDifference]:
    """The differences that fewer bits make in the layers of a saved model, over calibration rows.

    checkpoint, plugins: as in gr.load. kinds: of each table and dense layer that is rounded; or of the rows of all
    tables, and bf16 of all dense layers. rows, data: as in calibration.
    """
    saved = load(checkpoint, plugins=plugins)
    other = deepcopy(saved.model)
    if isinstance(kinds, str):
        parts = dense_layers(other) if kinds == "bf16" else table_weights(other)
        kinds = dict.fromkeys(parts, kinds)
    own = calibration(saved, data, rows)
    with rounded(other, kinds):
        return compare_layers(saved.model, other, own.batches, own.forward)


def package_layers(
    package: Path, checkpoint: str | Path, *, rows: int, data: Path | None = None, plugins: Collection[str] = ()
) -> list[LayerDifference]:
    """The differences of rounded_layers for the types that a package was exported with.

    The package's compiled passes are not asked: golden rows compare them with the model at every opening. Raises
    ServingError where the package is of another kind of model or has other tables than the checkpoint.
    """
    manifest = read_manifest(package, read_current(package))
    path = resolve(checkpoint)
    kind = served_kind(load_config(path / CONFIG, plugins=plugins))
    if manifest.kind != kind:
        raise ServingError(
            f"{package} serves a {manifest.kind} model, {path} is a {kind} model: name its own checkpoint"
        )
    return rounded_layers(path, manifest.kinds, rows=rows, data=data, plugins=plugins)


@torch.no_grad()
def compare_layers(
    reference: nn.Module, candidate: nn.Module, batches: Iterable[Any], forward: Forward
) -> list[LayerDifference]:
    """The differences of all layers, in the order in which the reference computes them.

    forward: runs a model on a batch. Layers of one form only are left out; a layer whose outputs have other shapes in
    the other form is an error, as are forms without a layer in common. Raises ServingError.
    """
    sums: dict[str, _Sums] = {}
    for batch in batches:
        with _outputs(reference) as expected:
            forward(reference, batch)
        with _outputs(candidate) as actual:
            forward(candidate, batch)
        for layer, (kind, output) in expected.items():
            if layer not in actual:
                continue
            other = actual[layer][1]
            if output.shape != other.shape:
                raise ServingError(
                    f"layer {layer} gives {tuple(output.shape)} in one model and {tuple(other.shape)} in the other: "
                    "compare forms of one model on the same rows"
                )
            sums.setdefault(layer, _Sums(kind)).add(output, other)
    if not sums:
        raise ServingError("the two models have no layer in common that any row reaches")
    return [total.difference(layer) for layer, total in sums.items()]


def first_that_differs(layers: Sequence[LayerDifference]) -> LayerDifference | None:
    return next((layer for layer in layers if layer.differs), None)


@contextmanager
def _outputs(model: nn.Module) -> Iterator[dict[str, tuple[str, Tensor]]]:
    """The floating-point outputs of all calls of all modules while it is open, with their module's class."""
    outputs: dict[str, tuple[str, Tensor]] = {}
    calls: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            calls[name] = call = calls.get(name, 0) + 1
            layer = f"{name}#{call}" if call > 1 else name
            for key, tensor in tensors_of(output):
                if tensor.is_floating_point():
                    outputs[f"{layer}[{key}]" if key else layer] = type(module).__name__, tensor.detach().clone()

        return keep

    handles = [module.register_forward_hook(hook(name or "model")) for name, module in model.named_modules()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def tensors_of(output: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a layer's output, with the key of each; no key for the only one."""
    if isinstance(output, Tensor):
        yield "", output
        return
    if isinstance(output, JaggedTensor | KeyedTensor):
        yield "", output.values()
        return
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        parts = output.items()
    elif isinstance(output, list | tuple):
        parts = enumerate(output)
    elif is_dataclass(output):
        parts = [(field.name, getattr(output, field.name)) for field in fields(output)]
    for key, part in parts:
        for inner, tensor in tensors_of(part):
            yield f"{key}.{inner}" if inner else str(key), tensor
