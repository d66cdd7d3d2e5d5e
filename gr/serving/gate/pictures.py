"""The pictures of rounding: the sensitivity of tables, and the layers that it passes through. Imports matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from gr.serving.gate.dtypes import DtypeChoice
from gr.serving.gate.numerics import LayerDifference

_ROW = 0.28  # inches of a table or layer
_MARKERS = {"fp16": "o", "int8": "s", "int4": "D", "int2": "^", "bf16": "v"}


def draw_sensitivities(choice: DtypeChoice, path: Path) -> None:
    """A line a table or dense layer: the sensitivity of each of its types, and the one that was chosen.

    The suffix of `path` chooses the format.
    """
    parts = list(dict.fromkeys(each.part for each in choice.sensitivities))
    figure, axes = plt.subplots(figsize=(7.5, 2.0 + _ROW * len(parts)), layout="constrained")
    for kind, marker in _MARKERS.items():
        points = [each for each in choice.sensitivities if each.kind == kind and each.sensitivity > 0]
        places = [parts.index(each.part) for each in points]
        axes.scatter([100 * each.sensitivity for each in points], places, marker=marker, s=28, label=kind)
    chosen = [each for each in choice.sensitivities if choice.kinds[each.part] == each.kind and each.sensitivity > 0]
    axes.scatter(
        [100 * each.sensitivity for each in chosen],
        [parts.index(each.part) for each in chosen],
        s=130,
        facecolors="none",
        edgecolors="black",
        label="chosen",
    )
    axes.set(
        xscale="log",
        xlabel="divergence over the loss, % (one part rounded, the others as trained)",
        title=f"{choice.bytes / choice.fp32_bytes:.3f} of the bytes of fp32",
        yticks=range(len(parts)),
        yticklabels=parts,
    )
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(_MARKERS) + 1, fontsize=8)
    _save(figure, path)


def draw_layers(layers: Sequence[LayerDifference], path: Path) -> None:
    """A bar a layer, in the order of the computation: its signal-to-noise ratio; none where nothing differs."""
    figure, axes = plt.subplots(figsize=(8.5, 1.4 + _ROW * len(layers)), layout="constrained")
    height = [layer.snr if math.isfinite(layer.snr) else 0.0 for layer in layers]
    axes.barh(range(len(layers)), height)
    for place, layer in enumerate(layers):
        if not math.isfinite(layer.snr):
            axes.text(0, place, " equal" if layer.snr > 0 else " no signal, or not finite", va="center", fontsize=7)
    axes.set(xlabel="signal to noise, dB", yticks=range(len(layers)), yticklabels=[layer.layer for layer in layers])
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
