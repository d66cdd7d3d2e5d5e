"""The dense part of a click model in fewer bits: bytes, processor time of the compiled pass, what the gate measures.

    OMP_NUM_THREADS=1 python -m benchmarks.serving_dense [--checkpoint runs/clicks --data data/clicks/test]

Times are of linear layers as wide as those of DLRM on Criteo, compiled as `gr export` compiles. int8: weights alone, a
scale an output. torchao: its Int8WeightOnlyConfig, where it is installed. B rows.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr.embeddings import table_weights
from gr.models.saved import load
from gr.serving.export import _COMPILER_OPTIONS
from gr.serving.gate.accuracy_gate import Limits
from gr.serving.gate.calibration import calibration

WIDTHS = (479, 1024, 1024, 512, 256, 1)
BATCHES = (1, 8, 64, 512)
ROUNDS = 9


class Int8Linear(nn.Module):
    """y = (x W^T) * scale + bias, W of int8."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale_O = linear.weight.detach().abs().amax(1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale_O[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale_O)
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale + self.bias


class InDtype(nn.Module):
    """float32 in and out, computed in another type."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.to(self.dtype)).float()


def in_int8(module: nn.Module) -> nn.Module:
    """A copy of the module with every linear layer's weights in int8."""
    copied = copy.deepcopy(module)
    for name, each in list(copied.named_modules()):
        if isinstance(each, nn.Linear):
            copied.set_submodule(name, Int8Linear(each))
    return copied


def forms(base: nn.Module) -> dict[str, nn.Module]:
    """The layers in each form."""
    made = {"fp32": base, "bf16": InDtype(copy.deepcopy(base), torch.bfloat16), "int8": in_int8(base)}
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        return made
    made["torchao"] = copy.deepcopy(base)
    quantize_(made["torchao"], Int8WeightOnlyConfig())
    return made


def compiled(module: nn.Module, folder: Path) -> Callable[[Tensor], Tensor]:
    """The module through AOTInductor, with its weights inside."""
    from torch._inductor import aoti_compile_and_package

    shapes = ({0: torch.export.Dim("rows", min=1, max=1 << 24)},)
    with torch.no_grad():
        program = torch.export.export(module.eval(), (torch.randn(16, WIDTHS[0]),), dynamic_shapes=shapes)
        options = {**_COMPILER_OPTIONS, "aot_inductor.package_constants_in_so": True}
        aoti_compile_and_package(program, package_path=str(folder / "pass.pt2"), inductor_configs=options)
    loader = torch._C._aoti.AOTIModelPackageLoader(str(folder / "pass.pt2"), "model", False, 1, -1)
    return lambda x: loader.run([x])[0]


def times() -> None:
    """Prints the processor time of each form, interleaved."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for into, out in pairwise(WIDTHS):
        layers += [nn.Linear(into, out), nn.ReLU()]
    base = nn.Sequential(*layers[:-1])
    runs = {name: compiled(each, Path(tempfile.mkdtemp())) for name, each in forms(base).items()}
    print(f"widths {WIDTHS}; processor us a call, median of {ROUNDS}; ratio to fp32")
    for B in BATCHES:
        x_BD, calls = torch.randn(B, WIDTHS[0]), max(1, 500 // B)
        spent: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                start = time.process_time()
                for _ in range(calls):
                    run(x_BD)
                spent[name].append((time.process_time() - start) / calls * 1e6)
        medians = {name: statistics.median(each) for name, each in spent.items()}
        print(f"B = {B}: " + ", ".join(f"{n} {t:.0f} ({t / medians['fp32']:.2f})" for n, t in medians.items()))


def accuracy(checkpoint: str, data: str | None) -> None:
    """Prints what the accuracy gate says of a click model's dense part in each form, and its bytes."""
    saved = load(checkpoint)
    rows = calibration(saved, data)
    _ = rows.reference
    tables = {id(weight) for weight in table_weights(saved.model).values()}
    dense = sum(each.numel() for each in saved.model.parameters() if id(each) not in tables)
    weights = sum(each.weight.numel() for each in saved.model.modules() if isinstance(each, nn.Linear))
    quantised = copy.deepcopy(saved.model)
    for name in ("bottom", "top"):
        if (part := getattr(quantised, name)) is not None:
            setattr(quantised, name, in_int8(part))
    candidates = {"int8": (quantised, 4 * dense - 3 * weights, False), "bf16": (saved.model, 2 * dense, True)}
    for name, (model, size, autocast) in candidates.items():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            report = rows.gate(rows.predict(model), Limits())
        print(f"{name}: {size:,} of {4 * dense:,} bytes; {report.verdict}")
        for measure in report.tasks[0].measures:
            print(f"    {measure}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint")
    parser.add_argument("--data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.checkpoint:
        accuracy(arguments.checkpoint, arguments.data)
    else:
        times()
